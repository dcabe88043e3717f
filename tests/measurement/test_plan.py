"""The plan: what is compared, how many at a time, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from lightning_netsim.measurement.plan import (
    PackedCost,
    Probe,
    Rates,
    SetSizes,
    SweepPlan,
    make_plan,
    measure_rates,
    memory_budget,
)
from lightning_netsim.measurement.settings import SweepSettings

CPU = torch.device("cpu")
FAST, SMALL = PackedCost(200_000, 50_000, 0, 1e-5), PackedCost(40_000, 50_000, 3e6, 1e-6)
PROBE = Probe(1, 300_000, {True: FAST, False: SMALL}, 60_000, 1000, first=4e-4, sketch=1e-4, again=3e-4)
RATES = Rates(products=1e11, bytes=1e10)
INDEX = 8 * 1000


def plan(number: int | None = 10_000, budget: float = 1e12, same: bool = True, **settings: Any) -> SweepPlan:
    sizes = SetSizes(number, number, same)
    return make_plan(SweepSettings(**settings), PROBE, sizes, RATES, budget, CPU)


def test_few_samples_are_all_compared_and_many_are_not() -> None:
    assert plan(1000).kind == "store"
    assert plan(50_000).kind == "sketch"
    assert plan(1000).fast
    assert plan(1000).num_sweeps == plan(50_000).num_sweeps == 1


def test_all_pairs_are_compared_where_that_takes_little_longer() -> None:
    numbers = range(500, 20_000, 100)
    both = [tuple(plan(number, plan=kind).seconds or 0 for kind in ("store", "sketch")) for number in numbers]
    kinds = [plan(number).kind for number in numbers]
    assert kinds == ["store" if exact <= 1.3 * sketched else "sketch" for exact, sketched in both]
    assert any(kind == "store" and exact > sketched for kind, (exact, sketched) in zip(kinds, both, strict=True))


def test_what_does_not_fit_is_packed_smaller_and_then_swept_again() -> None:
    large = plan(budget=(FAST.bytes + INDEX) * 10_000)
    assert (large.kind, large.fast, large.bytes) == ("sketch", True, (FAST.bytes + INDEX) * 10_000)
    small = plan(budget=(FAST.bytes + INDEX) * 10_000 - 1)
    assert (small.kind, small.fast, small.bytes) == ("sketch", False, (SMALL.bytes + INDEX) * 10_000)
    assert small.seconds is not None
    assert large.seconds is not None
    assert small.seconds > large.seconds
    swept = plan(budget=SMALL.bytes * 5000 + INDEX * 10_000)
    assert swept.kind == "reiterate"
    assert swept.bytes <= SMALL.bytes * 5000 + INDEX * 10_000
    assert swept.num_stored * (swept.num_sweeps - 1) >= 10_000


def test_of_unknown_length_one_lot_at_a_time_is_ranked() -> None:
    made = plan(None, budget=2e9)
    assert (made.kind, made.seconds) == ("reiterate", None)
    assert 2 * made.num_stored * min(FAST.bytes, SMALL.bytes) <= 2e9
    with pytest.raises(ValueError, match="Expected `plan` to be one for a set of unknown size, but got 'store'"):
        plan(None, plan="store")


def test_who_chooses_an_index_has_it_searched() -> None:
    assert plan(1000, index_factory="HNSW8").kind == "sketch"


def test_two_sets_are_both_kept() -> None:
    apart = plan(1000, same=False, plan="store")
    assert apart.num_stored == 2000
    assert apart.seconds is not None
    same = plan(1000, plan="store")
    assert same.seconds is not None
    assert apart.seconds > 1.5 * same.seconds


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"plan": "store"}, SMALL.bytes * 10_000),
        ({"plan": "sketch"}, (SMALL.bytes + INDEX) * 10_000),
        ({}, INDEX * 10_000 + 2 * 64 * SMALL.bytes),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_budget_that_works(settings: dict[str, Any], least: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected `memory_budget` to be at least {int(least):,} bytes") as caught:
        plan(budget=least - 1, **settings)
    assert "Choose a larger `memory_budget`, a smaller `max_samples`" in str(caught.value)
    assert plan(budget=least, **settings).bytes == least


def test_the_chunk_shrinks_with_the_budget() -> None:
    sizes = [plan(10, budget=budget).chunk_size for budget in (1e6, 3e6, 1e7, 1e12)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 64
    assert sizes[0] >= 1
    assert plan(chunk_size=7).chunk_size == 7


def test_the_budget_is_a_share_of_free_memory_or_as_set() -> None:
    assert memory_budget(SweepSettings(memory_budget=123), CPU) == 123
    free = psutil.virtual_memory().available
    assert 0.1 * free < memory_budget(SweepSettings(), CPU) < 0.5 * free  # What is free changes meanwhile.


def test_rates_are_those_of_a_machine() -> None:
    rates = measure_rates(CPU)
    assert 1e8 < rates.products < 1e16
    assert 1e7 < rates.bytes < 1e14
    assert measure_rates(CPU) is rates


def test_describe() -> None:
    stored = SweepPlan("store", 64, True, 1000, 54_000, 2**20 * 31, 1, 2, 2062, seconds=42.4)
    assert stored.describe(1000) == (
        "1,000 samples, 2 directions, 2,062 parameters: one sweep, exact features stored (31 MiB), all pairs compared, "
        "about 42 s."
    )
    sketched = replace(stored, kind="sketch", num_features=1024, num_directions=1, seconds=None)
    assert sketched.describe(1000) == (
        "1,000 samples, 1 direction, 2,062 parameters: one sweep, exact features stored (31 MiB), candidates from 1,024 "
        "sketched features compared exactly."
    )
    again = replace(sketched, kind="reiterate", num_sweeps=3, num_stored=500)
    assert again.describe(None) == (
        "an unknown number of samples, 1 direction, 2,062 parameters: 3 sweeps, exact features of 500 samples at a time "
        "(31 MiB), candidates from 1,024 sketched features compared exactly."
    )


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    made = SweepPlan("store", 64, True, 5, 1, 1, 1, 1, 1, seconds=seconds)
    assert made.describe(5).endswith(f", about {text}.")


def test_record() -> None:
    record = plan(1000).as_record(16, {"layer": 4}, 1e9 + 0.5)
    assert record["methods"] == {"layer": 4}
    assert record["memory_budget"] == 1_000_000_000
    assert record["kind"] == "store"
