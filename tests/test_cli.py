"""Run the command line in this process: every file in configs/, at a small size, and what a user may get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_netsim import __version__
from lightning_netsim.cli import NetsimCLI, main
from tests.marks import slow_but

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
CONFIGURED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
PLAIN = """
seed_everything: 3
model: ImageClassifier
data: DigitsDataModule
trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: runs}}]}
"""

Run = Callable[..., NetsimCLI]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `main` for an empty working directory and a command line that holds nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["netsim"])
    monkeypatch.setattr(os, "environ", dict(os.environ))  # Lightning notes the seed there
    (tmp_path / "plain.yaml").write_text(PLAIN, encoding="utf-8")
    return lambda *args: main(list(args))


def test_each_question_has_its_configuration() -> None:
    assert {"digits", "mnist", "toy_sinusoid"} <= set(CONFIGURED)


@pytest.mark.parametrize("name", CONFIGURED)
def test_configuration_says_what_it_answers_how_to_run_it_and_how_to_read_it(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    opening = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("Question:", "Run:", "Read:", f"--config configs/{path.name}"):
        assert word in opening
    assert yaml.safe_load(text)["trainer"]["default_root_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("name", slow_but(["digits", "similarity_loss", "domain_mmd"], CONFIGURED))
def test_configuration_runs_and_writes_its_tables(name: str, run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    needs_data = "MNIST" in config["data"]["class_path"]
    extra = [f"--data.data_dir={request.getfixturevalue('data_dir')}"] if needs_data else []
    cli = run("fit", f"--config={path}", *SMALL, "--data.batch_size=32", *extra)
    assert cli.trainer.global_step == 2
    figures = cli.trainer.callback_metrics
    assert torch.isfinite(figures.get("val_loss", figures.get("val_recall@1")))
    assert all(torch.isfinite(value) for name, value in figures.items() if name.startswith("netsim/"))
    [log_dir] = (tmp_path / "runs" / path.stem).iterdir()
    assert (log_dir / "config.yaml").is_file()
    if "SimilarityMonitor" not in str(config["trainer"].get("callbacks")):
        return
    [epoch] = (log_dir / "netsim").iterdir()
    assert {"samples.parquet", "neighbors.parquet", "meta.json"} <= {file.name for file in epoch.iterdir()}


@pytest.mark.slow
def test_two_loggers_share_one_directory_and_the_next_run_takes_a_new_one(run: Run, tmp_path: Path) -> None:
    loggers = (
        "{class_path: CSVLogger, init_args: {save_dir: runs}}, {class_path: TensorBoardLogger, init_args: {save_dir: runs}}"
    )
    for _ in range(2):
        run("fit", "--config=plain.yaml", *SMALL, f"--trainer.logger=[{loggers}]")
    versions = sorted((tmp_path / "runs" / "lightning_logs").iterdir())
    assert [version.name for version in versions] == ["version_0", "version_1"]
    for version in versions:
        assert (version / "metrics.csv").is_file()
        assert list(version.glob("events.out.tfevents.*"))


def test_every_command_runs_from_the_checkpoint_of_a_fit(run: Run) -> None:
    fitted = run("fit", "--config=plain.yaml", *SMALL)
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    for command, metric in [("validate", "val_acc"), ("test", "test_acc"), ("predict", None)]:
        options = [f"--ckpt_path={checkpoint}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        cli = run(command, "--config=plain.yaml", *options)
        if metric:
            assert 0 <= cli.trainer.callback_metrics[metric] <= 1
        for name, value in fitted.model.network.state_dict().items():
            torch.testing.assert_close(cli.model.network.state_dict()[name], value)


@pytest.mark.slow
def test_runs_with_one_seed_are_equal(run: Run) -> None:
    first, second, other = (run("fit", "--config=plain.yaml", *SMALL, f"--seed_everything={seed}").model for seed in (3, 3, 4))
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    assert not torch.equal(first.network[0].weight, other.network[0].weight)


def test_bad_input_ends_with_one_sentence(run: Run) -> None:
    with pytest.raises(SystemExit, match=r"netsim: Expected `data_dir` to be .* set `download: true`"):
        run("fit", "--config=plain.yaml", "--data=MNISTDataModule", "--data.data_dir=nowhere", "--model.network=mnist", *SMALL)


def test_missing_data_dir_is_said_before_anything_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", f"--config={CONFIGS / 'mnist.yaml'}")
    assert stop.value.code == 2
    assert "the following arguments are required: data_dir" in capsys.readouterr().err


def test_help_lists_the_commands(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: netsim ")
    for command in ("fit", "validate", "test", "predict", "neighbors", "transfer"):
        assert f"    {command} " in text
    with pytest.raises(SystemExit):
        run("neighbors", "--help")
    text = capsys.readouterr().out
    for option in ("--query", "--k K", "--ckpt_path", "--set {train,val,test,predict}", "--reference", "--output"):
        assert option in text


@pytest.mark.slow
def test_module_is_a_command() -> None:
    command = [sys.executable, "-m", "lightning_netsim", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == f"netsim lightning_netsim {__version__}"


CRITERIA = {
    "PairSimilarityLoss": "",
    "MinibatchSimilarityLoss": "",
    "InvarianceLoss": "transform: {class_path: torchvision.transforms.v2.RandomAffine, init_args: {degrees: 20}}",
    "TangentLoss": "operators: [torch.nn.functional.silu]",
    "DensityLoss": "target: 0.4",
}


@pytest.mark.parametrize("name", slow_but(["InvarianceLoss"], CRITERIA))
def test_every_criterion_runs_from_yaml(name: str, run: Run, tmp_path: Path) -> None:
    criterion = f"{{class_path: {name}, init_args: {{{CRITERIA[name]}}}}}"
    (tmp_path / "criterion.yaml").write_text(
        f"model: {{class_path: SimilarityClassifier, init_args: {{criterion: {criterion}}}}}\ndata: DigitsDataModule\n",
        encoding="utf-8",
    )
    cli = run("fit", "--config=plain.yaml", "--config=criterion.yaml", *SMALL)
    assert type(cli.model.similarity_criterion).__name__ == name
    assert torch.isfinite(cli.trainer.callback_metrics["netsim/similarity_loss"])
    checkpoint = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    [log_dir] = (tmp_path / "runs" / "lightning_logs").iterdir()
    run("fit", f"--config={log_dir / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2")
    again = type(cli.model).load_from_checkpoint(checkpoint)
    assert repr(again.similarity_criterion) == repr(cli.model.similarity_criterion)


EMBEDDING_LOSSES = {
    "ContrastiveLoss": "margin: 0.5",
    "MetricLearningLoss": "loss: ProxyAnchorLoss, miner: MultiSimilarityMiner, "
    "loss_args: {num_classes: 10, embedding_size: 64}",
}


@pytest.mark.parametrize("name", slow_but(["MetricLearningLoss"], EMBEDDING_LOSSES))
def test_every_loss_of_embeddings_runs_from_yaml(name: str, run: Run, tmp_path: Path) -> None:
    criterion = f"{{class_path: {name}, init_args: {{{EMBEDDING_LOSSES[name]}}}}}"
    alignment = "{class_path: DifferenceAlignmentLoss, init_args: {norm: l2, pairs: all, num_differences: 50}}"
    options = f"contrastive_criterion: {criterion}, alignment_criterion: {alignment}, contrastive_labels: 5"
    (tmp_path / "losses.yaml").write_text(
        f"model: {{class_path: MetricLearner, init_args: {{{options}}}}}\ndata: DigitsDataModule\n", encoding="utf-8"
    )
    cli = run("fit", "--config=plain.yaml", "--config=losses.yaml", *SMALL)
    assert type(cli.model.contrastive_criterion).__name__ == name
    assert {"netsim/contrastive_loss", "netsim/alignment_loss"} <= cli.trainer.callback_metrics.keys()
    checkpoint = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    again = type(cli.model).load_from_checkpoint(checkpoint)
    assert again.contrastive_criterion.config() == cli.model.contrastive_criterion.config()
    assert again.alignment_criterion.config() == cli.model.alignment_criterion.config()
    [log_dir] = (tmp_path / "runs" / "lightning_logs").iterdir()
    run("fit", f"--config={log_dir / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2")


@pytest.mark.slow
def test_a_run_draws_by_the_counts_of_another(run: Run, tmp_path: Path) -> None:
    config = f"--config={CONFIGS / 'density.yaml'}"
    whole = [option for option in SMALL if "limit_" not in option]
    run("fit", config, *whole)
    again = run("fit", config, *whole, "--data.counts=runs/density/version_0", "--trainer.callbacks=null")
    counts = again.datamodule.train_sampler.counts
    order = again.datamodule.train_sampler.order(0)
    assert (counts[order].diff() >= 0).all()
    assert len(order) == len(again.datamodule.train_set)


def test_options_of_the_mixin_are_options_of_the_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--model.help=SimilarityClassifier")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model.criterion", "--model.similarity_weight", "--model.similarity_parameters", "--model.network"):
        assert option in text
    cli = run(
        "fit", "--config=plain.yaml", "--model=SimilarityClassifier", "--model.similarity_weight=[[0,0.1],[9,0.2]]", *SMALL
    )
    assert cli.trainer.callback_metrics["netsim/similarity_weight"] == pytest.approx(0.1 + 0.1 / 9)


FUNCTIONS = """
import torch

def kernel(x, y):
    return x @ y.mT

def prior(number, width):
    return torch.ones(number, width)
"""


def test_functions_are_named_in_the_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    loss = "{class_path: MMDLoss, init_args: {kernel: mine.kernel}}"
    model = f"{{class_path: DomainClassifier, init_args: {{mmd_prior: mine.prior, mmd_criterion: {loss}}}}}"
    (tmp_path / "named.yaml").write_text(f"model: {model}\ndata: DigitsDataModule\n", encoding="utf-8")
    cli = run("fit", "--config=named.yaml", "--trainer.logger=false", *SMALL)
    assert callable(cli.model.mmd_criterion.kernel)
    assert torch.isfinite(cli.trainer.callback_metrics["netsim/mmd_loss"])
