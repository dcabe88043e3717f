"""The verbs that answer for single samples, on the command line and as methods of the trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import find_neighbors, find_transfer, load_run
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.neighbors import NeighborAnswer
from lightning_netsim.analysis.transfer import TransferAnswer
from lightning_netsim.analysis.verbs import NetsimTrainer
from lightning_netsim.cli import NetsimCLI, main
from lightning_netsim.demos import DigitsDataModule, ImageClassifier
from tests.test_cli import PLAIN, SMALL

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

Run = Callable[..., NetsimCLI]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the log directory of a short fit."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("fitted")
        _quieten(patch, directory)
        (directory / "plain.yaml").write_text(PLAIN, encoding="utf-8")
        log_dir = main(["fit", "--config=plain.yaml", *SMALL]).trainer.log_dir
    return directory / str(log_dir)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `main` for an empty working directory."""
    _quieten(monkeypatch, tmp_path)
    (tmp_path / "plain.yaml").write_text(PLAIN, encoding="utf-8")
    return lambda *args: main([*args, *QUIET])


def _quieten(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.chdir(directory)
    patch.setattr(sys, "argv", ["netsim"])
    patch.setattr(os, "environ", dict(os.environ))  # Lightning notes the seed there


def checkpoint_of(log_dir: Path) -> Path:
    [path] = (log_dir / "checkpoints").iterdir()
    return path


def trainer() -> NetsimTrainer:
    return NetsimTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def answered(cli: NetsimCLI) -> Any:
    assert isinstance(cli.trainer, NetsimTrainer)
    return cli.trainer.answer


def test_neighbors_of_a_checkpoint(run: Run, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The configuration that a run keeps serves too.
    cli = run(
        "neighbors",
        f"--config={fitted / 'config.yaml'}",
        f"--ckpt_path={checkpoint_of(fitted)}",
        "--query=3,17",
        "--k=5",
        "--reference=train",
        "--directions=2",
        "--data.val_fraction=0.1",
        "--output=answer",
    )
    answer = answered(cli)
    assert isinstance(answer, NeighborAnswer)
    data = DigitsDataModule(val_fraction=0.1)
    data.setup("validate")
    model = ImageClassifier(network="digits")
    model.load_state_dict(torch.load(checkpoint_of(fitted), weights_only=True)["state_dict"])
    direct = find_neighbors(model, data.val_dataloader(), [3, 17], data.train_dataloader(), 5, directions=2, progress=False)
    assert answer.neighbors.equals(direct.neighbors)
    assert answer.samples.equals(direct.samples)
    output = capsys.readouterr().out
    assert "Kernel neighbors · val" in output
    assert "2 samples, compared exactly with 1,617 of train" in output
    assert output.endswith("Written to answer\n")
    assert load_run(tmp_path / "answer").neighbors.equals(direct.neighbors)
    assert (tmp_path / "answer" / "neighbors.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"plain.yaml", "answer"}, "a question must not start a run"


def test_transfer_of_a_checkpoint(run: Run, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(
        "transfer", "--config=plain.yaml", f"--ckpt_path={checkpoint_of(fitted)}", "--query=3", "--k=4", "--output=answer"
    )
    answer = answered(cli)
    assert isinstance(answer, TransferAnswer)
    assert isinstance(cli.datamodule, DigitsDataModule)
    direct = find_transfer(cli.model, cli.datamodule.val_dataloader(), 3, progress=False)
    assert answer.samples.equals(direct.samples)
    output = capsys.readouterr().out
    assert "What else moves if sample 3 is corrected" in output
    assert "of val in" in output
    assert pd.read_parquet(tmp_path / "answer" / "transfer.parquet").equals(direct.samples)
    again = run("transfer", "--config=plain.yaml", "--query=[3]", "--change=[0,0,0,1,0,0,0,0,0,0]", "--directions=change")
    assert answered(again).meta["change"][3] == 1
    assert "no ckpt_path" in capsys.readouterr().err


def test_bad_input_ends_with_one_sentence(run: Run, fitted: Path) -> None:
    with pytest.raises(SystemExit, match=r"^netsim: Expected `query` to be .* from 0 to 718, but got 719\.$"):
        run("neighbors", "--config=plain.yaml", f"--ckpt_path={checkpoint_of(fitted)}", "--query=719")
    # The checkpoint keeps the hyperparameters of its network, which must not take the place of those asked for.
    with pytest.raises(
        SystemExit, match=r"^netsim: Expected `ckpt_path` to be a checkpoint of this model.*`network\.0\.weight`"
    ):
        run("neighbors", "--config=plain.yaml", "--model.network=mnist", f"--ckpt_path={checkpoint_of(fitted)}", "--query=3")


class OwnData(LightningModule):
    """A model that serves its own data, in two loaders, and changes each batch on its way to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def prepare_data(self) -> None:
        self.asked.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.asked.append(stage)
        inputs = torch.arange(24.0).sin().reshape(12, 2)
        self.parts = [TensorDataset(inputs[:5], torch.arange(5) % 2), TensorDataset(inputs[5:], torch.arange(5, 12) % 2)]

    def configure_model(self) -> None:
        torch.manual_seed(2)
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 3 + dataloader_idx, batch[1]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(part, batch_size=4) for part in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        self.log("seen", 1.0)  # Refused by Lightning outside a step.
        return self.layer(x)


@pytest.mark.parametrize("datamodule", [None, LightningDataModule()])
def test_a_model_with_its_own_loaders(datamodule: LightningDataModule | None) -> None:
    model, asker = OwnData(), trainer()
    asker.neighbors(model, datamodule, query=[1, 7], k=3)
    assert model.asked == ["prepare_data", "validate"]
    inputs = torch.cat([part.tensors[0] * 3 + number for number, part in enumerate(model.parts)])
    direct = find_neighbors(model.layer, [(inputs, torch.arange(12) % 2)], [1, 7], k=3, progress=False)
    assert isinstance(asker.answer, NeighborAnswer)
    assert asker.answer.neighbors["neighbor"].tolist() == direct.neighbors["neighbor"].tolist()
    with pytest.raises(NetsimError, match="Expected `set` to be one that model or data module serve by `test_dataloader`"):
        asker.neighbors(model, datamodule, query=1, set="test")


class Loaders(LightningDataModule):
    """A data module whose own hook counts before that of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 100, batch[1]

    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        return {"only": DataLoader(TensorDataset(torch.eye(2), torch.arange(2)))}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(6, 2), torch.arange(6) % 2), batch_size=2, shuffle=True)


def test_the_hooks_of_the_data_module_come_first() -> None:
    seen: list[float] = []

    class Watched(OwnData):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.detach().min()))
            return super().forward(x)

    data = Loaders()
    trainer().neighbors(Watched(), data, query=0, set="test", reference="train", k=2)
    assert min(seen) > 50
    assert data.stages == ["fit", "test"]


def save(path: Path, state: dict[str, Any]) -> str:
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, path)
    return str(path)


def test_a_checkpoint_has_to_fit(tmp_path: Path) -> None:
    data, model = DigitsDataModule(), ImageClassifier(network="digits")
    right = model.state_dict()
    first, second, *_, last = right
    cases = {
        "missing": {name: value for name, value in right.items() if name != first},
        "more": {**right, "surplus": torch.zeros(3)},
        "shape": {**right, second: torch.zeros(7), last: torch.zeros(2)},
    }
    complaints = {
        "missing": rf"`{first}` is \(.*\) in the model and missing in the checkpoint\. Give the configuration",
        "more": r"`surplus` is missing in the model and \(3,\) in the checkpoint\. Give",
        "shape": rf"`{second}` is \(.*\) in the model and \(7,\) in the checkpoint; `{last}` is .*\(2,\) in the checkpoint\.",
    }
    before = {name: value.clone() for name, value in right.items()}
    for name, state in cases.items():
        with pytest.raises(NetsimError, match=complaints[name]):
            trainer().neighbors(model, data, query=3, ckpt_path=save(tmp_path / name, state))
    with pytest.raises(NetsimError, match=r"; and \d+ more\. Give"):
        trainer().neighbors(model, data, query=3, ckpt_path=save(tmp_path / "other", {"a": torch.zeros(1)}))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.strict_loading = False
    trainer().neighbors(model, data, query=3, k=1, directions=1, ckpt_path=save(tmp_path / "missing", cases["missing"]))


class Extra:
    """Something that is neither a tensor nor a plain value."""


def test_a_checkpoint_has_to_be_one(tmp_path: Path) -> None:
    data, model = DigitsDataModule(), ImageClassifier(network="digits")
    (tmp_path / "text").write_text("not a checkpoint", encoding="utf-8")
    (tmp_path / "empty").touch()
    whole = save(tmp_path / "whole", model.state_dict())
    (tmp_path / "short").write_bytes(Path(whole).read_bytes()[:2000])
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": model.state_dict(), "extra": Extra()}, tmp_path / "extra")
    for name, complaint in {
        "nowhere": "which does not exist",
        "text": r"which cannot be read \(.*add --weights_only false",
        "empty": r"which cannot be read \(",
        "short": r"which cannot be read \(",
        "list": "which has no `state_dict`",
        "extra": r"which cannot be read \(.*add --weights_only false",
    }.items():
        with pytest.raises(
            NetsimError, match=f"Expected `ckpt_path` to be a checkpoint that Lightning wrote, but got .*{complaint}"
        ):
            trainer().neighbors(model, data, query=3, ckpt_path=str(tmp_path / name))
    trainer().neighbors(model, data, query=3, k=1, directions=1, ckpt_path=str(tmp_path / "extra"), weights_only=False)


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        (None, "`query` to be positions of samples, separated by commas, but got none. Add --query 3,17"),
        ("three", "`query` to be positions of samples, integers separated by commas, but got 'three'"),
        ("3,", "`query` to be positions of samples, integers separated by commas, but got '3,'"),
        ("1.5", "`query` to be positions of samples, integers"),
        ("3,3", "`query` to be different positions, but got 3 more than once"),
        ("-1", "`query` to be positions of samples in the data set, from 0 to 718, but got -1"),
    ],
)
def test_bad_queries_are_named(query: Any, complaint: str) -> None:
    with pytest.raises(NetsimError, match=complaint):
        trainer().neighbors(ImageClassifier(network="digits"), DigitsDataModule(), query=query)


def test_other_bad_input_is_named(tmp_path: Path) -> None:
    model, data = ImageClassifier(network="digits"), DigitsDataModule()
    with pytest.raises(NetsimError, match="`query` to be the position of one sample, but got 2"):
        trainer().transfer(model, data, query="3,4")
    with pytest.raises(NetsimError, match="`k` to be at most 718, the number of other samples in the reference set"):
        trainer().neighbors(model, data, query=3, k=719)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear", encoding="utf-8")
    (tmp_path / "file").touch()
    for ask in (trainer().neighbors, trainer().transfer):
        with pytest.raises(NetsimError, match=r"`output` to be a new directory or one of an earlier answer.*with other files"):
            ask(model, data, query=3, output=str(tmp_path / "full"))
        with pytest.raises(NetsimError, match="`output` to be a writable directory"):
            ask(model, data, query=3, output=str(tmp_path / "file"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_an_answer_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    model, data = ImageClassifier(network="digits"), DigitsDataModule(val_fraction=0.1)
    for query in (3, 4):
        trainer().neighbors(model, data, query=query, k=2, directions=1, output=str(tmp_path / "answer"))
    assert load_run(tmp_path / "answer").samples["index"].tolist() == [4]
