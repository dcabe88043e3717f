from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ctv
from tests.benchmarks.conftest import NOWHERE

SMALL = ["--differences", "24", "--coordinates", "3", "--many", "40", "--images", "20", "--rounds", "1", "--steps", "1"]
SMALL += ["--threads", "1", "--data-dir", NOWHERE]


def weigh_nothing(norms: Sequence[str], options: argparse.Namespace) -> list[float]:
    """Stand in for fresh processes, which take seconds to start."""
    return [float(options.many)] * len(norms)


def test_quick_run_prints_its_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctv, "peaks", weigh_nothing)
    figures = ctv.main(["--quick", *SMALL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for name in ctv.BOUNDS:
        assert figures[name] > 0
    assert figures["speedup_pairwise"] == min(figures["speedups"]["pairs"].values())
    assert figures["speedups"]["pairs"].keys() == {"l1", "squared_l2"}
    assert figures["disagreement"] <= ctv.TOLERANCE
    assert figures["peak_megabytes_many"] == {"l1": 40.0, "squared_l2": 40.0, "l2": 40.0}


def test_without_room_for_all_pairs_they_are_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctv, "peaks", weigh_nothing)
    free = 4 * 24 * 23 // 2 * 3 * 4
    monkeypatch.setattr(ctv.psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=free))
    figures = ctv.main(SMALL)
    assert "more than is free: not measured" in capsys.readouterr().out
    assert figures["speedup_pairwise"] is None
    assert figures["speedups"]["pairs"] == {}
    assert figures["held"].keys() == {"regularizer_ratio"}


def test_forms_that_disagree_are_refused() -> None:
    differences = ctv.random_differences(6, 3).double()
    assert ctv.largest_disagreement(ctv.FORMS, differences) < 1e-14
    wrong = {**ctv.FORMS, "wrong": lambda m, norm: 1.01 * ctv.by_pairs(m, norm)}
    with pytest.raises(RuntimeError, match=r"disagree by 1\.0e-02"):
        ctv.largest_disagreement(wrong, differences)


def test_the_bytes_of_all_pairs() -> None:
    first, second = torch.triu_indices(16, 16, offset=1)
    differences = ctv.random_differences(16, 5)
    assert ctv.pair_bytes(16, 5) == (differences[first] - differences[second]).nbytes
    assert ctv.pair_bytes(16_384, 128) == 68_715_282_432


def test_memory_is_measured_in_a_fresh_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Sequence[str]] = []

    def start(script: str, runs: Sequence[Sequence[str]]) -> list[float]:
        started.extend(runs)
        return [ctv.main(arguments)["megabytes"] for arguments in runs]

    monkeypatch.setattr(ctv.common, "peaks_megabytes", start)
    parser = ctv.common.make_parser(None, ctv.SIZES)
    options = ctv.common.read_arguments(parser, ctv.SIZES, ["--many", "4096", "--coordinates", "32", "--threads", "1"])
    (megabytes,) = ctv.peaks(["l1"], options)
    assert [*started[0][:4]] == ["--measure-memory", "l1", "--many", "4096"]
    assert json.loads(capsys.readouterr().out) == {"megabytes": megabytes}
    assert megabytes < 33, "half of one number for each pair of differences"
