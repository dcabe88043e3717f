from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import similarity_cost
from tests.benchmarks.conftest import NOWHERE


def test_quick_run_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", "12", "--rounds", "1", "--steps", "0", "--threads", "1", "--data-dir", NOWHERE]
    figures = similarity_cost.main(["--quick", *small])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for name in similarity_cost.BOUNDS:
        assert figures[name] > 0
    assert figures["disagreement"] < similarity_cost.TOLERANCE


def test_ways_that_disagree_are_refused() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    first, second = (similarity_cost.Step(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), images, labels) for _ in range(2))
    assert similarity_cost.largest_disagreement(first, first) == 0
    with pytest.raises(RuntimeError, match="disagree by"):
        similarity_cost.largest_disagreement(first, second)
