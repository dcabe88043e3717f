"""The plan: stored or sketched, how many at a time, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lightning_netsim.jacobian import PerSampleJacobian, per_sample_jacobian
from lightning_netsim.plan import SweepPlan, SweepSettings, make_plan, memory_budget, plan_record

CPU = torch.device("cpu")
P = 100 * 20 + 20 + 20 * 2 + 2


def jacobian() -> PerSampleJacobian:
    model = nn.Sequential(nn.Linear(100, 20), nn.Tanh(), nn.Linear(20, 2))
    result = per_sample_jacobian(model, torch.randn(4, 100))
    result.gram()
    return result


def plan(num_samples: int | None = 1000, width: int = 64, **settings: Any) -> SweepPlan:
    return make_plan(SweepSettings(**settings), jacobian(), num_samples, width, CPU)


STORED = 2 * 4 * 2 * P * 1000  # In the store and in the index, float32, d = 2.
SKETCHED = 2 * 4 * 2 * 64 * 1000


@pytest.mark.parametrize(
    ("budget", "kind", "size"), [(STORED, "store", STORED), (STORED - 1, "sketch", SKETCHED), (SKETCHED, "sketch", SKETCHED)]
)
def test_what_fits_is_stored(budget: int, kind: str, size: int) -> None:
    made = plan(memory_budget=budget)
    assert (made.kind, made.bytes) == (kind, size)
    assert made.num_features == (2 * P if kind == "store" else 128)
    assert (made.num_directions, made.num_parameters) == (2, P)


def test_of_unknown_length_nothing_is_stored_unless_the_sketch_is_as_wide() -> None:
    assert plan(num_samples=None).kind == "sketch"
    assert plan(num_samples=None, width=P).kind == "store"


@pytest.mark.parametrize("kind", ["store", "sketch"])
def test_the_users_word_counts(kind: str) -> None:
    assert plan(plan=kind, memory_budget=STORED).kind == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"plan": "store", "memory_budget": STORED - 1},
            f"at least {STORED:,} bytes to store all features, but got {STORED - 1:,}",
        ),
        ({"memory_budget": SKETCHED - 1}, f"at least {SKETCHED:,} bytes for sketched features, but got {SKETCHED - 1:,}"),
        ({"memory_budget": STORED - 1, "thresholds": (0.5,)}, "bytes for hard and power counts, which need all features"),
        ({"plan": "sketch", "powers": (2.0,)}, "bytes for hard and power counts, which need all features"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan(**arguments)
    assert str(caught.value).startswith("Expected `memory_budget`")
    assert "Choose a larger `memory_budget`, a smaller `max_samples`" in str(caught.value)


def test_the_chunk_shrinks_with_the_budget() -> None:
    sizes = [plan(num_samples=10, memory_budget=budget).chunk_size for budget in (1e5, 1e6, 3e6, 1e12)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 64
    assert sizes[0] >= 1
    assert plan(chunk_size=7).chunk_size == 7


def test_the_budget_is_a_share_of_free_memory_or_as_set() -> None:
    assert memory_budget(SweepSettings(memory_budget=123)) == 123
    free = psutil.virtual_memory().available
    assert 0 < memory_budget(SweepSettings()) < free


def test_describe() -> None:
    stored = SweepPlan("store", 64, 4124, 2**20 * 31, 2, 2062, seconds=42.4)
    wanted = "1,000 samples, 2 directions, 2,062 parameters: one sweep, exact features stored (31 MiB), about 42 s."
    assert stored.describe(1000) == wanted
    sketched = SweepPlan("sketch", 64, 4096, 2**15, 1, 2062)
    wanted = (
        "an unknown number of samples, 1 direction, 2,062 parameters: two sweeps, exact counts, "
        "4,096 sketched features a sample (32 KiB a sample)."
    )
    assert sketched.describe(None) == wanted


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    made = replace(SweepPlan("store", 64, 1, 1, 1, 1), seconds=seconds)
    assert made.describe(5).endswith(f", about {text}.")


def test_record() -> None:
    record = plan_record(plan(memory_budget=STORED), {"layer": 4}, STORED + 0.5)
    assert record["methods"] == {"layer": 4}
    assert record["memory_budget"] == STORED
    assert record["kind"] == "store"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "Expected `k` to be a positive int"),
        ({"projection_dim": -3}, "Expected `projection_dim` to be a positive int, but got -3"),
        ({"plan": "stored"}, "Expected `plan` to be one of 'auto', 'store', 'sketch', but got 'stored'. Did you mean 'store'?"),
        ({"chunk_size": 0}, "Expected `chunk_size` to be a positive int"),
        ({"memory_budget": 0}, "Expected `memory_budget` to be a positive number, but got 0. It is a number of bytes"),
        ({"memory_budget": -1.0}, "Expected `memory_budget` to be a positive number"),
        ({"directions": "some"}, "Expected `directions` to be one of"),
        ({"thresholds": (2.0,)}, "Expected `thresholds` to be numbers within"),
        ({"powers": (-1.0,)}, "Expected `powers` to be numbers within"),
        ({"index_factory": "Flatt"}, "Expected `index_factory`"),
    ],
)
def test_settings_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        SweepSettings(**arguments)
    assert message in str(caught.value)
