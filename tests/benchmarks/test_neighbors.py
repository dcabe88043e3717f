from __future__ import annotations

import json

import pytest
import torch

from benchmarks import counting, neighbors
from benchmarks.problems import Problem
from tests.benchmarks.conftest import NOWHERE


def test_exact_similarities_are_those_of_float64_gradients(problem: Problem) -> None:
    rows, queries = counting.exact_rows(problem), torch.tensor([1, 4])
    expected = rows[queries] @ rows.T
    expected[[0, 1], queries] = -torch.inf
    torch.testing.assert_close(neighbors.exact_similarity(problem, 1, queries), expected, rtol=0, atol=1e-4)


def test_exact_similarities_of_blocks_are_put_together(digits: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = torch.tensor([0, 2, 3])
    expected = neighbors.exact_similarity(digits, "all", queries)
    monkeypatch.setattr(neighbors, "ROWS", 2)
    monkeypatch.setattr(neighbors, "COLUMNS", 1000)
    torch.testing.assert_close(neighbors.exact_similarity(digits, "all", queries), expected, rtol=0, atol=1e-6)


def test_recall_counts_ties_and_misses() -> None:
    similarity = torch.tensor([[-torch.inf, 0.9, 0.8, 0.8 - 1e-8, 0.1], [0.5, -torch.inf, 0.4, 0.3, 0.2]])
    assert neighbors.recall(torch.tensor([[1, 2], [0, 2]]), similarity) == 1.0
    assert neighbors.recall(torch.tensor([[1, 3], [2, 0]]), similarity) == 1.0
    assert neighbors.recall(torch.tensor([[1, 4], [0, -1]]), similarity) == 0.5
    assert neighbors.recall(torch.tensor([[0, 1], [0, 2]]), similarity) == 0.75


def test_quick_run_prints_its_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "K", 3)
    small = [
        "--images",
        "8",
        "--table-images",
        "7",
        "--resnet-images",
        "6",
        "--output-images",
        "18",
        "--queries",
        "4",
        "--threads",
        "1",
    ]
    figures = neighbors.main(["--quick", *small, "--data-dir", NOWHERE])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert neighbors.BOUNDS.keys() <= figures.keys()
    assert figures["ratio_plain"] > 0
    # So few are all among the candidates.
    assert figures["recall_at_10"] == 1.0
    assert {name.rpartition("_")[0] for name in figures["recalls"]} == {"mnist_1", "mnist_all", "resnet20_1", "resnet20_all"}
    assert {name.rpartition("_")[2] for name in figures["recalls"]} == {"store", "sketch"}
