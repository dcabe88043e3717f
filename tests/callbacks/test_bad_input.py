"""What cannot be measured is refused in one sentence, before the first optimizer step where it can be known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_netsim import SimilarityBatch, SimilarityMonitor
from lightning_netsim._checks import NetsimError
from tests.callbacks.runs import SAMPLES, Stream, quiet_trainer
from tests.callbacks.small import Small, points, records, train, watching


def assert_one_sentence(error: pytest.ExceptionInfo[NetsimError]) -> None:
    message = str(error.value)
    assert message.startswith("Expected `")
    assert message.endswith(".")
    assert "\n" not in message


class Returning(Small):
    """Return something else of the logits."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.net(batch[0]).square().mean()


class BatchStatistics(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(2, nn.BatchNorm1d(5, track_running_stats=False))


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class WrongStep(Small):
    def similarity_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])


class WrongLabels(Small):
    def similarity_step(self, batch: Any, batch_idx: int) -> SimilarityBatch:
        return SimilarityBatch(self.net(batch[0]), labels=[1, 2])


def combined(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": points(), "b": points()}, mode)


@pytest.mark.parametrize(
    ("model", "settings", "options", "words"),
    [
        # Outputs that cannot be compared; what `read_batch` says of others is tested there.
        (lambda: Returning(lambda logits: logits[:, 0]), {}, {}, r"`outputs`.*\(B, D\).*\(8,\).*unsqueeze"),
        (lambda: Returning(lambda logits: logits.detach()), {}, {}, "`outputs`.*differentiable.*no gradient.*detach"),
        (lambda: Returning(lambda logits: None), {}, {}, "`model`.*NoneType.*similarity_step"),
        (lambda: Returning(lambda logits: logits - logits.mean(0)), {}, {}, "(?i)other samples|batch"),
        (BatchStatistics, {}, {}, "(?i)batch"),
        (Frozen, {}, {}, "`model`.*trainable parameter"),
        # Also where the first epochs are not measured.
        (WrongStep, {"every_n_epochs": 5}, {}, "`similarity_step`.*SimilarityBatch.*Tensor"),
        (Small, {"directions": 4}, {}, "`directions`.*3"),
        (Small, {"parameters": "head"}, {}, "`parameters`.*trainable.*'head'"),
        (Small, {"activation_layer": "head"}, {}, "layer`.*'head'.*net.3"),
        (Small, {"memory_budget": 100.0}, {}, "`memory_budget`.*at least"),
        (Small, {"k": SAMPLES}, {}, f"`k`.*at most {SAMPLES - 1}.*but got {SAMPLES}"),
        (Small, {"k": SAMPLES}, {"num_sanity_val_steps": 0}, "`k`.*at most"),
        (Small, {"k": 16}, {"limit_val_batches": 2}, "`k`.*at most 15"),
        (Small, {"k": 3, "max_samples": 3}, {}, "`k`.*at most 2"),
        (Small, {"reference": "train", "k": 17}, {}, "`k`.*at most 16"),
        (Small, {}, {"val": combined("max_size")}, "`loader`.*one after the other.*sequential"),
        (Small, {}, {"val": combined("max_size_cycle")}, "`loader`.*one after the other.*sequential"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    model: Any, settings: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    module = model()
    with pytest.raises(NetsimError, match=words) as error:
        train(tmp_path, watching(**settings), module=module, **options)
    assert_one_sentence(error)
    assert module.steps == 0


def test_labels_that_do_not_fit_the_batch(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"`labels`.*8 values.*2"):
        train(tmp_path, watching(), module=WrongLabels())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "`k`.*positive int"),
        ({"reference": "training"}, "`reference`.*'train'.*'training'"),
        ({"every_n_epochs": 0}, "`every_n_epochs`"),
        ({"max_samples": -1}, "`max_samples`"),
        ({"max_overhead": 0}, "`max_overhead`"),
        ({"keep": "bset"}, "`keep`.*Did you mean 'best'"),
        ({"keep": "best"}, "`monitor`"),
        ({"mode": "most"}, "`mode`"),
    ],
)
def test_arguments_are_checked_when_the_monitor_is_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(NetsimError, match=words) as error:
        SimilarityMonitor(**options)
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Small()
    with pytest.raises(NetsimError, match=r"`dirpath`.*writable directory.*Choose another"):
        train(tmp_path / "run", watching(dirpath=tmp_path / "file" / "tables"), module=module)
    assert module.steps == 0


def test_a_strategy_that_shards_the_model() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(NetsimError, match=r"`strategy`.*FSDPStrategy.*ddp") as error:
        watching().setup(trainer, Small(), "fit")
    assert_one_sentence(error)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_training_set_as_reference_where_there_is_none(stage: str, tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=f"`reference`.*{stage}.*training loader"):
        getattr(quiet_trainer(tmp_path, [watching(reference="train")]), stage)(Small(), points())


def test_several_training_loaders_as_reference(tmp_path: Path) -> None:
    module = Small()
    trainer = quiet_trainer(tmp_path, [watching(reference="train")], max_epochs=1)
    with pytest.raises(NetsimError, match=r"`reference`.*2 of them"):
        trainer.fit(module, [points(), points()], points())
    assert module.steps == 0


def test_a_stream_shared_by_several_processes(tmp_path: Path) -> None:
    class Pretending(Trainer):
        world_size = 2  # type: ignore[assignment]

    trainer = Pretending(
        default_root_dir=tmp_path, callbacks=[watching()], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    with pytest.raises(NetsimError, match=r"`loader`.*several processes.*single device") as error:
        trainer.validate(Small(), DataLoader(Stream(), batch_size=8), verbose=False)
    assert_one_sentence(error)


class FailingLater(Small):
    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs.detach() if self.trainer.current_epoch == 1 else outputs


def test_what_was_written_stays_when_a_later_epoch_fails(tmp_path: Path) -> None:
    module = FailingLater()
    with pytest.raises((NetsimError, RuntimeError)):
        train(tmp_path, watching(figures=True), module=module)
    (record,) = records(tmp_path / "netsim")
    assert record.meta["epoch"] == 0
    assert len(record.samples) == SAMPLES
    assert record.samples["soft_count"].notna().all()
    assert (record.path / "counts.png").is_file()
    assert [place.name for place in (tmp_path / "netsim").iterdir()] == ["epoch=0-step=1"]


def test_an_unknown_metric_for_the_best_is_named_and_the_record_stays(tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=r"`monitor`.*score.*'scroe'"):
        train(tmp_path, watching(keep="best", monitor="scroe"), module=Small((1, 2)))
    assert len(records(tmp_path / "netsim")) == 1


def test_a_failing_disk_stops_with_the_earlier_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    written = pd.DataFrame.to_parquet
    calls: list[str] = []

    def fail(self: Any, target: Path, **options: Any) -> None:
        calls.append(Path(target).name)
        if len(calls) > 4:  # four tables an epoch
            raise OSError(28, "No space left on device")
        written(self, target, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, watching())
    (record,) = records(tmp_path / "netsim")
    assert len(record.samples) == SAMPLES
