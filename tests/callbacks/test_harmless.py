"""A run with the monitor is bit for bit the run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_netsim import SimilarityMonitor
from tests.callbacks.runs import Data, Network, Witness, fit, quiet_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16_mixed": {"precision": "bf16-mixed"},
    "bfloat16_true": {"precision": "bf16-true"},
    "float64": {"precision": "64-true"},
    "accumulation": {"accumulate_grad_batches": 4, "val_check_interval": 3},
    "limited": {"limit_val_batches": 2},
    "no_sanity": {"num_sanity_val_steps": 0},
    "no_inference_mode": {"inference_mode": False},
}


def assert_same(left: Any, right: Any, where: str = "") -> None:
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for position, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{position}]")
    elif hasattr(left, "tobytes"):
        assert left.tobytes() == right.tobytes(), where
    else:
        assert left == right, where


def monitor() -> SimilarityMonitor:
    return SimilarityMonitor(k=3, summary=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_fit_is_bit_identical(name: str, tmp_path: Path) -> None:
    watching = monitor()
    _, _, with_monitor = fit(tmp_path / "with", watching, "noise", **OPTIONS[name])
    _, _, without = fit(tmp_path / "without", None, "noise", **OPTIONS[name])
    assert watching.result is not None
    assert_same(with_monitor.seen, without.seen)


@pytest.mark.parametrize("kind", ["shuffled", "stream", "two", "batches"])
def test_every_kind_of_loader_is_left_alone(kind: str, tmp_path: Path) -> None:
    watching = monitor()
    _, _, with_monitor = fit(tmp_path / "with", watching, kind)
    _, _, without = fit(tmp_path / "without", None, kind)
    assert watching.result is not None
    assert len(watching.result.queries.index) == 22
    assert_same(with_monitor.seen, without.seen)


def test_two_sweeps_change_nothing(tmp_path: Path) -> None:
    for kind in ("noise", "shuffled"):
        small = SimilarityMonitor(k=3, summary=False, plan="reiterate", projection_dim=64)
        _, _, with_monitor = fit(tmp_path / f"with-{kind}", small, kind)
        _, _, without = fit(tmp_path / f"without-{kind}", None, kind)
        assert small.record is not None
        assert small.record.meta["plan"]["kind"] == "reiterate"
        assert_same(with_monitor.seen, without.seen)


@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_averaged_weights_are_measured_and_left_in_place(kind: str, tmp_path: Path) -> None:
    averaged, raw = monitor(), monitor()
    _, _, with_monitor = fit(tmp_path / "with", averaged, kind, [EMAWeightAveraging(decay=0.5)])
    _, _, without = fit(tmp_path / "without", None, kind, [EMAWeightAveraging(decay=0.5)])
    fit(tmp_path / "raw", raw, kind)
    assert_same(with_monitor.seen, without.seen)
    assert averaged.record is not None
    assert raw.record is not None
    assert averaged.record.meta["weights"] == "averaged"
    assert not averaged.record.samples["gradient_norm"].equals(raw.record.samples["gradient_norm"])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_are_bit_identical(stage: str, tmp_path: Path) -> None:
    def run(watching: SimilarityMonitor | None, path: Path) -> tuple[Any, list[dict[str, Any]]]:
        seed_everything(0)
        network, witness = Network(), Witness()
        trainer = quiet_trainer(path, [*([watching] if watching else []), witness])
        results = getattr(trainer, stage)(network, datamodule=Data("noise"), verbose=False)
        logged = [{key: value for key, value in result.items() if not key.startswith("netsim/")} for result in results]
        return logged, witness.seen

    watching = monitor()
    assert_same(run(watching, tmp_path / "with"), run(None, tmp_path / "without"))
    assert watching.result is not None


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    def run(watching: bool, path: Path) -> list[dict[str, Any]]:
        first = monitor() if watching else None
        trainer, _, _ = fit(path, first, "noise", max_epochs=1)
        trainer.save_checkpoint(path / "last.ckpt")
        again = monitor() if watching else None
        seed_everything(1)
        witness, network = Witness(), Network()
        resumed = quiet_trainer(path, [*([again] if again else []), witness], max_epochs=2)
        resumed.fit(network, Data("noise"), ckpt_path=path / "last.ckpt", weights_only=True)
        if again is not None:
            assert [row["epoch"] for row in again.history] == [0, 1]
        return witness.seen

    assert_same(run(True, tmp_path / "with"), run(False, tmp_path / "without"))
