from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import counting
from benchmarks.problems import Problem


def counts_by_autograd(problem: Problem) -> Tensor:
    """Return the sums of cosines of gradients in float64, from nothing but autograd."""
    network, rows = problem.network.double(), []
    for image in problem.inputs():
        value = (network(image.double()[None]) @ problem.direction.double()).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))]))
    problem.network.float()
    unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return (unit @ unit.T).sum(1)


def test_exact_rows_are_unit_gradients(problem: Problem) -> None:
    rows = counting.exact_rows(problem)
    assert rows.shape == (5, problem.num_parameters)
    torch.testing.assert_close(rows @ rows.sum(0), counts_by_autograd(problem), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ours", "ours_stored", "vmap_two_pass", "vmap_jvp", "loop", "VmapStored"])
def test_every_way_counts_the_same(problem: Problem, name: str) -> None:
    way = counting.VmapStored() if name == "VmapStored" else getattr(counting, name)
    expected = counts_by_autograd(problem)
    for _ in range(2):  # Nothing is left over from the first time.
        torch.testing.assert_close(way(problem).double(), expected, rtol=1e-4, atol=1e-4)


def test_plain_leaves_no_gradients(problem: Problem) -> None:
    total = counting.plain(problem)
    with torch.no_grad():
        expected = (problem.network(problem.inputs()) @ problem.direction).sum()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in problem.network.parameters())


@pytest.mark.parametrize(
    ("wrong", "by", "passes"), [(0, 0.0, True), (3, 1e-3, True), (1000, 1e-3, False), (20, 1e-3, False), (1, 0.5, False)]
)
def test_disagreement_forgives_few_images_a_little(wrong: int, by: float, passes: bool) -> None:
    expected = torch.arange(1000.0) + 100
    counts = expected.clone()
    counts[:wrong] *= 1 + by
    assert (counting.disagreement(counts, expected) <= counting.TOLERANCE) is passes


def test_disagreement_of_counts_below_one_is_absolute() -> None:
    expected = torch.full((10,), 1e-3)
    assert counting.disagreement(expected + 1e-5, expected) == pytest.approx(1e-5, rel=1e-3)
