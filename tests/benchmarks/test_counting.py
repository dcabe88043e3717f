"""All ways of counting count the same, by this package and by others; what is wrong is found and not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import adapters, counting, neighbors, peers
from benchmarks.adapters import Way
from benchmarks.problems import Problem, cifar
from tests.benchmarks.conftest import NOWHERE

MISSING = "needs `pip install -e .[bench]`"


def unit_gradients(problem: Problem) -> Tensor:
    """Return the normalized gradients in float64, from nothing but autograd."""
    network, rows = problem.network.double(), []
    for image in problem.inputs():
        value = (network(image.double()[None]) @ problem.direction.double()).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))]))
    problem.network.float()
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


@pytest.mark.parametrize("name", ["ours", "ours_stored", "vmap_two_pass", "vmap_jvp", "loop", "VmapStored"])
def test_every_way_counts_the_same(problem: Problem, name: str) -> None:
    way = counting.VmapStored() if name == "VmapStored" else getattr(counting, name)
    rows = unit_gradients(problem)
    for _ in range(2):  # Nothing is left over from the first time.
        torch.testing.assert_close(way(problem).double(), (rows @ rows.T).sum(1), rtol=1e-4, atol=1e-4)


def test_exact_rows_similarities_and_matrix_are_those_of_float64_gradients(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = unit_gradients(problem), torch.tensor([1, 4])
    torch.testing.assert_close(counting.exact_rows(problem), rows, rtol=1e-9, atol=1e-9)
    expected = rows[queries] @ rows.T
    expected[[0, 1], queries] = -torch.inf
    for size, columns in ((neighbors.ROWS, neighbors.COLUMNS), (1, 1000)):  # In one block, and in several.
        monkeypatch.setattr(neighbors, "ROWS", size)
        monkeypatch.setattr(neighbors, "COLUMNS", columns)
        torch.testing.assert_close(neighbors.exact_similarity(problem, 1, queries), expected, rtol=0, atol=1e-4)
    job, similarity = peers.matrix_of(problem), peers.similarity_matrix(problem)
    assert job.error_of(similarity) < 1e-4
    assert job.error_of(similarity + 1e-3) == pytest.approx(1e-3, rel=0.1)


def test_plain_leaves_no_gradients(problem: Problem) -> None:
    with torch.no_grad():
        expected = (problem.network(problem.inputs()) @ problem.direction).sum()
    torch.testing.assert_close(counting.plain(problem), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in problem.network.parameters())


@pytest.mark.parametrize(("wrong", "by", "passes"), [(0, 0.0, True), (3, 1e-3, True), (20, 1e-3, False), (1, 0.5, False)])
def test_disagreement_forgives_few_images_a_little(wrong: int, by: float, passes: bool) -> None:
    expected = torch.arange(1000.0) + 100
    counts = expected.clone()
    counts[:wrong] *= 1 + by
    assert (counting.disagreement(counts, expected) <= counting.TOLERANCE) is passes
    few = torch.full((10,), 1e-3)  # Below one it is absolute.
    assert counting.disagreement(few + 1e-5, few) == pytest.approx(1e-5, rel=1e-3)


def test_recall_counts_ties_and_misses() -> None:
    similarity = torch.tensor([[-torch.inf, 0.9, 0.8, 0.8 - 1e-8, 0.1], [0.5, -torch.inf, 0.4, 0.3, 0.2]])
    assert neighbors.recall(torch.tensor([[1, 2], [0, 2]]), similarity) == 1.0
    assert neighbors.recall(torch.tensor([[1, 3], [2, 0]]), similarity) == 1.0
    assert neighbors.recall(torch.tensor([[1, 4], [0, -1]]), similarity) == 0.5
    assert neighbors.recall(torch.tensor([[0, 1], [0, 2]]), similarity) == 0.75


@pytest.mark.parametrize("name", ["backpack", "backpack_norms", "opacus", "captum"])
def test_peers_count_the_same(problem: Problem, name: str) -> None:
    pytest.importorskip(name.partition("_")[0], reason=MISSING)
    rows, way = counting.exact_rows(problem), getattr(adapters, name)(problem)
    for _ in range(2):
        torch.testing.assert_close(way().double(), rows @ rows.sum(0), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in problem.network.parameters())


def test_dattri_forms_the_same_matrix_once_its_projection_is_off(digits: Problem) -> None:
    pytest.importorskip("dattri", reason=MISSING)
    rows = counting.exact_rows(digits)
    torch.testing.assert_close(adapters.dattri(digits, batch_size=5)().double(), rows @ rows.T, rtol=0, atol=1e-4)
    hidden = adapters.dattri(digits, batch_size=5, hidden_projection=True)()
    assert (hidden.double() - rows @ rows.T).abs().max() > 1e-3


def test_frozen_batch_norm_is_batch_norm_in_evaluation_mode() -> None:
    problem = cifar(NOWHERE, 2)
    for module in problem.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    frozen = adapters.without_batch_norm(problem.network).train()
    assert not list(frozen.buffers())
    torch.testing.assert_close(frozen(problem.inputs()), problem.network(problem.inputs()))


def scaled(factor: float) -> Callable[[Problem], Way]:
    return lambda problem: lambda: counting.loop(problem) * factor


def refusing(problem: Problem) -> Way:
    raise NotImplementedError("no such layer")


def test_what_is_wrong_or_refuses_is_not_timed(digits: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name != "missing")
    ways = {"right": scaled(1), "wrong": scaled(1.01), "nan": scaled(torch.nan), "refusing": refusing, "missing": refusing}
    job = peers.counts_of(digits).check(ways)
    assert job.refused == {
        "wrong": "wrong: off by 1.0e-02",
        "nan": "wrong: off by nan",
        "refusing": "refused: NotImplementedError: no such layer",
        "missing": "not installed",
    }
    assert job.time(rounds=1)
    assert [name for name, record in job.records().items() if record["correct"]] == ["ours", "right"]
    assert job.fastest == "right"
    job.right["right"] = lambda: counting.loop(digits) * 1.01
    assert not job.time(rounds=1)
    job.right["ours"] = job.right["right"]
    with pytest.raises(RuntimeError, match=r"off by 1\.0e-02"):
        job.check({})
