"""Two processes that share the work find what one finds, and notice when they do not mean the same data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_netsim.data.processes import Processes
from tests import sharing


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    return sharing.together(tmp_path_factory.mktemp("sharing"), sharing.shared)


@pytest.mark.parametrize("size", [sharing.SIZE, sharing.FEW])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", sharing.PLANS)
def test_both_find_what_one_process_finds(two: list[dict[str, Any]], plan: str, apart: bool, size: int) -> None:
    alone = sharing.values(sharing.measured(plan, apart, size=size))
    assert alone["num_left_out"] == 1 + apart
    if size == sharing.SIZE:
        assert (alone["num_sweeps"] > 2) == (plan == "reiterate")
    for process in two:
        found = process["found"][plan, apart, size]
        for name in ("index", "positions", "labels", "predictions", "num_reference", "num_left_out", "recall"):
            assert str(found[name]) == str(alone[name]), name
        for name in ("soft", "similarity", "norm", "activations", "hard", "power"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-5, atol=2e-5, equal_nan=True)
    # There were several lots to rank.
    assert all(process["found"]["reiterate", False, sharing.SIZE]["num_sweeps"] > 2 for process in two)


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
