"""Two processes that share the work find what one finds, and notice when they do not mean the same data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_netsim.data.processes import Processes
from tests import sharing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes wrote."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    path = tmp_path_factory.mktemp("sharing")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(sharing.__file__))
    running = [
        subprocess.Popen([sys.executable, script, str(path), str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(error[-2000:] for error in errors)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", sharing.PLANS)
def test_a_process_may_have_nothing_to_do(two: list[dict[str, Any]], plan: str, apart: bool) -> None:
    alone = sharing.values(sharing.measured(plan, apart, size=sharing.FEW))
    for process in two:
        found = process["few"][plan, apart]
        assert torch.equal(found["index"], alone["index"])
        torch.testing.assert_close(found["soft"], alone["soft"], rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", sharing.PLANS)
def test_both_find_what_one_process_finds(two: list[dict[str, Any]], plan: str, apart: bool) -> None:
    alone = sharing.values(sharing.measured(plan, apart))
    assert alone["num_left_out"] == 1 + apart
    assert (alone["num_sweeps"] > 2) == (plan == "reiterate")
    for process in two:
        found = process["found"][plan, apart]
        for name in ("index", "positions", "labels", "predictions", "num_reference", "num_left_out", "recall"):
            assert str(found[name]) == str(alone[name]), name
        for name in ("soft", "similarity", "norm", "activations", "hard", "power"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-5, atol=2e-5, equal_nan=True)


def test_several_lots_were_ranked(two: list[dict[str, Any]]) -> None:
    assert all(process["found"]["reiterate", False]["num_sweeps"] > 2 for process in two)


def test_processes_that_disagree_about_the_data_are_told(two: list[dict[str, Any]]) -> None:
    for process in two:
        size, labels = process["said"]
        assert "Expected `the number of samples` to be the same in every process" in size
        assert "(150, 150) in process 0, (151, 151) in process 1" in size
        assert "the labels of the first samples" in labels
        assert "Let every process make the same data set" in labels


def test_alone_nothing_is_exchanged() -> None:
    alone, value = Processes(), torch.ones(2)
    assert alone.alone
    assert alone.gather(3) == [3]
    assert alone.broadcast("x") == "x"
    assert alone.sum({"a": value})["a"] is value
    assert list(alone.interleave(iter([1, 2]))) == [1, 2]
    assert alone.concatenate(value) is value
    alone.check_agreement("anything", object())
    assert Processes.current().size == 1
