"""Candidates chosen by the error of their sketch, in the order of their exact similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.measurement.candidates import Reranking, shortlist_size

K, FETCHED = 3, 20


def problem(noise: float, queries: int = 40, number: int = 60) -> tuple[Tensor, KernelNeighborsResult]:
    """Return exact similarities, and the shortlist of their noisy ones."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(queries, number, generator=generator) * 1.8 - 0.9
    sketched = exact + noise * (1 - exact.square()) * torch.randn(exact.shape, generator=generator)
    top = sketched.topk(FETCHED, dim=1)
    return exact, KernelNeighborsResult(top.values, top.indices)


def compare(reranking: Reranking, chosen: Tensor, exact: Tensor) -> int:
    """Give the exact similarities of the chosen candidates, in two goes, as two blocks of the reference set would."""
    rows, columns, ids = reranking.candidates(chosen)
    values = exact[rows].gather(1, ids.clamp_min(0))
    for part in (0, 1):
        reranking.take(rows, columns, values.masked_fill((ids < 0) | (ids % 2 != part), torch.nan))
    return int((ids >= 0).sum())


def test_what_could_be_among_the_k_is_compared_and_found() -> None:
    exact, shortlist = problem(noise=0.15)
    reranking = Reranking(shortlist, K, error=0.15)
    assert compare(reranking, reranking.first(), exact) == 40 * 2 * K
    rest = reranking.rest()
    assert not bool(rest[:, : 2 * K].any())
    compared = compare(reranking, rest, exact)
    assert 0 < compared < 40 * (FETCHED - 2 * K)
    found = reranking.neighbors(recall=0.5)
    assert torch.equal(found.index, exact.topk(K).indices)
    assert torch.equal(found.similarity, exact.topk(K).values)
    assert found.recall == 0.5


def test_a_better_sketch_needs_fewer_comparisons() -> None:
    numbers = []
    for noise in (0.01, 0.1, 0.3):
        exact, shortlist = problem(noise)
        reranking = Reranking(shortlist, K, noise)
        compare(reranking, reranking.first(), exact)
        numbers.append(int(reranking.rest().sum()))
    assert numbers[0] < numbers[1] < numbers[2]


def test_without_exact_values_the_choice_is_wider() -> None:
    _, shortlist = problem(noise=0.15)
    reranking = Reranking(shortlist, K, error=0.15)
    at_once = reranking.first() | reranking.rest()
    exact, _ = problem(noise=0.15)
    compare(reranking, at_once, exact)
    assert torch.equal(reranking.neighbors().index, exact.topk(K).indices)


def test_the_margin_is_three_standard_errors_of_each_candidate() -> None:
    # At least 0.5 − 3 · 0.02 · (1 − 0.5²) = 0.455 for the first; 0.42 may be as much as 0.469, 0.40 no more than 0.4504.
    sketched = torch.tensor([[0.50, 0.45, 0.42, 0.40]])
    reranking = Reranking(KernelNeighborsResult(sketched, torch.arange(4).unsqueeze(0)), 1, error=0.02)
    assert reranking.rest().tolist() == [[True, True, True, False]]


def test_missing_candidates_are_no_neighbors() -> None:
    shortlist = KernelNeighborsResult(
        torch.tensor([[0.9, 0.5, torch.nan, torch.nan], [torch.nan] * 4]), torch.tensor([[7, 3, -1, -1], [-1] * 4])
    )
    reranking = Reranking(shortlist, K, error=0.1)
    rows, columns, ids = reranking.candidates(reranking.first())
    assert (rows.tolist(), ids.tolist()) == ([0], [[7, 3]])
    reranking.take(rows, columns, torch.tensor([[0.1, 0.2]]))
    assert not bool(reranking.rest().any())
    assert reranking.neighbors().index.tolist() == [[3, 7, -1], [-1, -1, -1]]


def test_shortlists_are_a_few_times_as_long_as_the_table() -> None:
    assert shortlist_size(2, 10_000) == 160
    assert shortlist_size(10, 10_000) == 160
    assert shortlist_size(50, 10_000) == 800
    assert shortlist_size(10, 30) == 30
