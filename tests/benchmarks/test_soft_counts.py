from __future__ import annotations

import json

import pytest

from benchmarks import counting, soft_counts
from benchmarks.problems import Problem
from tests.benchmarks.conftest import NOWHERE

SMALL = ["--images", "6", "--stored-images", "5", "--resnet-images", "4", "--rounds", "1", "--threads", "1"]


def test_quick_run_prints_its_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh process for each method takes seconds to start; one is started in the test below.
    monkeypatch.setattr(soft_counts, "peaks", lambda methods, options: [float(images) for _, images in methods])
    figures = soft_counts.main(["--quick", *SMALL, "--data-dir", NOWHERE])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last == figures
    assert "random images" in out
    ratios = ("ratio_plain", "ratio_plain_resnet20", "ratio_plain_stored", "speedup_vmap_stored", "speedup_vmap_two_pass")
    for key in ratios:
        assert last[key] > 0
    assert last["peak_growth"] == 2.0
    assert last["num_parameters"] == {"mnist": 317_069, "resnet20": 269_722}
    assert max(last["disagreement"].values()) <= 1e-4
    assert soft_counts.BOUNDS.keys() <= last.keys()


def test_a_wrong_count_stops_the_benchmark(digits: Problem) -> None:
    ways = {"right": counting.ours, "wrong": lambda problem: counting.ours(problem) * 1.01}
    with pytest.raises(RuntimeError, match=r"disagree by 1\.0e-02"):
        soft_counts.largest_disagreement(digits, ways)


def test_memory_is_measured_in_a_fresh_process() -> None:
    options = soft_counts.common.read_arguments(
        soft_counts.common.make_parser(None, soft_counts.SIZES), soft_counts.SIZES, ["--data-dir", NOWHERE, "--threads", "1"]
    )
    stored = 64 * 317_069 * 4 / 1e6
    plain, kept = soft_counts.peaks([("plain", 64), ("vmap_stored", 64)], options)
    assert kept > 0.9 * stored > plain
