"""A run with the monitor is bit for bit the run without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_netsim import SimilarityMonitor
from tests.callbacks.runs import SAMPLES, Data, Network, Witness, fit, quiet_trainer

SWEEPS = {"plan": "reiterate", "projection_dim": 64}
#: The validation loader, and what monitor and Trainer are told.
SITUATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("noise", {}, {}),
    "bfloat16_mixed": ("noise", {}, {"precision": "bf16-mixed"}),
    "bfloat16_true": ("noise", {}, {"precision": "bf16-true"}),
    "float64": ("noise", {}, {"precision": "64-true"}),
    "accumulation": ("noise", {}, {"accumulate_grad_batches": 4, "val_check_interval": 3}),
    "limited": ("noise", {}, {"limit_val_batches": 2}),
    "no_sanity": ("noise", {}, {"num_sanity_val_steps": 0}),
    "no_inference_mode": ("noise", {}, {"inference_mode": False}),
    "shuffled": ("shuffled", {}, {}),
    "stream": ("stream", {}, {}),
    "two": ("two", {}, {}),
    "batches": ("batches", {}, {}),
    "sweeps": ("noise", SWEEPS, {}),
    # Read again in order, which draws from all generators.
    "sweeps_shuffled": ("shuffled noise", SWEEPS, {}),
}
QUICK = ("plain", "bfloat16_mixed", "two", "sweeps_shuffled")


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return the names; those that are not quick are marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


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


def monitor(**settings: Any) -> SimilarityMonitor:
    return SimilarityMonitor(k=3, summary=False, **settings)


@pytest.mark.parametrize("name", slow_but(QUICK, SITUATIONS))
def test_fit_is_bit_identical(name: str, tmp_path: Path) -> None:
    kind, settings, options = SITUATIONS[name]
    watching = monitor(**settings)
    _, _, with_monitor = fit(tmp_path / "with", watching, kind, **options)
    _, _, without = fit(tmp_path / "without", None, kind, **options)
    assert watching.result is not None
    assert len(watching.result.queries.index) == (16 if name == "limited" else SAMPLES)
    assert watching.result.plan["kind"] == settings.get("plan", "store")
    assert_same(with_monitor.seen, without.seen)


@pytest.mark.parametrize("kind", slow_but(["stream"], ["plain", "stream"]))
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


@pytest.mark.parametrize("stage", slow_but(["test"], ["validate", "test"]))
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


@pytest.mark.slow
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
