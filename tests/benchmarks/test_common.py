from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks import common
from benchmarks.common import Bound, Size

SIZES = {"images": Size(1000, 10, "N"), "rounds": Size(5, 2, "timings")}


@pytest.mark.parametrize(
    ("arguments", "images", "rounds"),
    [([], 1000, 5), (["--quick"], 10, 2), (["--quick", "--images", "7"], 7, 2), (["--rounds", "3"], 1000, 3)],
)
def test_sizes_are_full_or_quick_or_given(arguments: list[str], images: int, rounds: int) -> None:
    options = common.read_arguments(common.make_parser("What it does.", SIZES), SIZES, [*arguments, "--threads", "1"])
    assert (options.images, options.rounds) == (images, rounds)
    assert torch.get_num_threads() == 1


def test_functions_take_turns_and_preparation_is_not_timed() -> None:
    calls: list[str] = []

    def note(name: str) -> str:
        calls.append(name)
        return name

    functions = {"a": lambda: note("a"), "b": lambda value: note(value)}
    seconds, answers = common.time_interleaved(functions, rounds=2, prepare={"b": lambda: note("made") and "b"})
    assert calls == ["made", "b", "a", "a", "made", "b", "made", "b", "a"]
    assert answers == {"a": "a", "b": "b"}
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ratio_is_the_median_of_ratios_within_a_round() -> None:
    seconds = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}
    assert common.ratio(seconds, "slow", "fast") == 3.0
    assert common.ratios(seconds, "slow", "fast") == [2.0, 3.0, 4.0]


def test_peak_memory_sees_what_is_freed_again() -> None:
    assert common.growth_megabytes(lambda: torch.ones(30_000_000).sum())["megabytes"] > 100


@pytest.mark.parametrize(("quick", "held"), [(False, {"low": True, "high": False}), (True, None)])
def test_last_line_says_which_bounds_hold(
    capsys: pytest.CaptureFixture[str], quick: bool, held: dict[str, bool] | None
) -> None:
    bounds = {"low": Bound(2.0), "high": Bound(2.0, at_least=True), "unmeasured": Bound(1.0)}
    options = argparse.Namespace(threads=1, quick=quick)
    common.finish({"low": 1.5, "high": 1.5, "unmeasured": None}, bounds, options)
    assert json.loads(capsys.readouterr().out).get("held") == held


def test_tables_are_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_table(("name", "figure"), [("a", 1234.5), ("long", 0.12345), ("none", None)])
    lines = capsys.readouterr().out.split("\n")[1:-2]
    assert lines == ["| name | figure |", "| ---- | -----: |", "| a    |  1,234 |", "| long |  0.123 |", "| none |      - |"]
