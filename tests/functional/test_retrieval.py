"""Figures of retrieval against loops over queries and their neighbors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_netsim._checks import NetsimError
from lightning_netsim.functional.retrieval import mean_average_precision_at_r, neighbor_vote, recall_at_k

NUM_QUERIES, NUM_NEIGHBORS = 40, 12


def random_matches(seed: int, share: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(NUM_QUERIES, NUM_NEIGHBORS, generator=generator) < share


def average_precision(matches: list[bool], num_relevant: int) -> float:
    """Return the sum over the first R places of the precision at those that match, divided by R."""
    total = 0.0
    for place in range(1, num_relevant + 1):
        if matches[place - 1]:
            total += sum(matches[:place]) / place
    return total / num_relevant


def voted(similarity: list[float], labels: list[int], num_classes: int, temperature: float) -> int:
    votes = [0.0] * num_classes
    for value, label in zip(similarity, labels, strict=True):
        if not math.isnan(value):
            votes[label] += math.exp(value / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [1, 2, 5, NUM_NEIGHBORS])
@pytest.mark.parametrize("seed", [0, 1])
def test_recall_is_the_share_of_queries_with_a_match_among_the_first(seed: int, k: int) -> None:
    matches = random_matches(seed)
    found = [any(row[:k]) for row in matches.tolist()]
    assert 0 < sum(found) < len(found)
    assert recall_at_k(matches, k).item() == pytest.approx(sum(found) / len(found))


def test_recall_never_falls_with_more_neighbors() -> None:
    matches = random_matches(2, share=0.1)
    recalls = [recall_at_k(matches, k).item() for k in range(1, NUM_NEIGHBORS + 1)]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]


@pytest.mark.parametrize("seed", [0, 1])
def test_mean_average_precision_is_the_mean_of_a_loop(seed: int) -> None:
    matches = random_matches(seed, share=0.4)
    num_relevant = torch.randint(0, NUM_NEIGHBORS + 1, (NUM_QUERIES,), generator=torch.Generator().manual_seed(seed))
    rows = [
        average_precision(row, relevant)
        for row, relevant in zip(matches.tolist(), num_relevant.tolist(), strict=True)
        if relevant
    ]
    assert 0 < len(rows) < NUM_QUERIES  # Queries of which there is no other sample are left out.
    found = mean_average_precision_at_r(matches, num_relevant)
    assert found.item() == pytest.approx(sum(rows) / len(rows), abs=1e-6)


def test_mean_average_precision_looks_no_further_than_r() -> None:
    matches = torch.tensor([[False, False, True, True]])
    assert mean_average_precision_at_r(matches, torch.tensor([2])).item() == 0
    assert mean_average_precision_at_r(matches.flip(1), torch.tensor([2])).item() == 1
    assert mean_average_precision_at_r(matches, torch.tensor([4])).item() == pytest.approx((1 / 3 + 2 / 4) / 4)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 100.0])
def test_a_vote_is_that_of_a_loop(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(NUM_QUERIES, NUM_NEIGHBORS, dtype=torch.float64, generator=generator) * 2 - 1
    labels = torch.randint(5, (NUM_QUERIES, NUM_NEIGHBORS), generator=generator)
    similarity[0, 3:] = math.nan
    labels[0, 3:] = -1
    wanted = [voted(*row, 5, temperature) for row in zip(similarity.tolist(), labels.tolist(), strict=True)]
    assert len(set(wanted)) == 5
    assert neighbor_vote(similarity, labels, temperature).tolist() == wanted
    assert neighbor_vote(similarity.float(), labels, temperature).tolist() == wanted


def test_the_temperature_decides_between_the_nearest_and_the_many() -> None:
    similarity, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]])
    assert neighbor_vote(similarity, labels).tolist() == [1]
    assert neighbor_vote(similarity, labels, temperature=10.0).tolist() == [0]


def test_missing_neighbors_do_not_vote() -> None:
    similarity, labels = torch.tensor([[0.1, math.nan, math.nan]]), torch.tensor([[1, -1, 0]])
    assert neighbor_vote(similarity, labels).tolist() == [1]


def test_nothing_to_judge() -> None:
    none = torch.zeros(0, 3, dtype=torch.bool)
    assert recall_at_k(none, 2).isnan()
    assert mean_average_precision_at_r(none, torch.zeros(0, dtype=torch.int64)).isnan()
    assert mean_average_precision_at_r(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)).isnan()
    assert neighbor_vote(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)


def test_bad_input_is_named() -> None:
    matches = random_matches(4)
    for wrong in (matches.float(), matches[0], [[True]]):
        with pytest.raises(NetsimError, match=r"Expected `matches` to be a boolean tensor of shape \(Q, K\), but got"):
            recall_at_k(wrong, 1)  # type: ignore[arg-type]
        with pytest.raises(NetsimError, match="Expected `matches`"):
            mean_average_precision_at_r(wrong, torch.ones(NUM_QUERIES))  # type: ignore[arg-type]
    with pytest.raises(NetsimError, match=f"Expected `k` to be at most {NUM_NEIGHBORS}, the number of neighbors, but got 13"):
        recall_at_k(matches, NUM_NEIGHBORS + 1)
    for k in (0, -1, True, 1.0):
        with pytest.raises(NetsimError, match="Expected `k` to be a positive int"):
            recall_at_k(matches, k)  # type: ignore[arg-type]
    for num_relevant in (torch.ones(3), torch.full((NUM_QUERIES,), NUM_NEIGHBORS + 1)):
        with pytest.raises(NetsimError, match="Expected `num_relevant` to be at most 12 for each of 40 queries"):
            mean_average_precision_at_r(matches, num_relevant.long())
    similarity, labels = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(NetsimError, match=r"Expected `similarity` to be a floating-point tensor of shape \(Q, k\)"):
        neighbor_vote(similarity[0], labels)
    with pytest.raises(NetsimError, match="Expected `temperature` to be a positive number"):
        neighbor_vote(similarity, labels, 0.0)


def test_a_low_temperature_leaves_the_nearest_vote() -> None:
    assert neighbor_vote(torch.tensor([[0.0, -0.1]]), torch.tensor([[1, 0]]), temperature=1e-4).item() == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[1.0, 0.0]]), "float32"),
        (torch.tensor([[1]]), r"\(1, 1\)"),
        ([[1, 3, 2]], r"\(1, 3\)"),
    ],
)
def test_bad_labels_of_neighbors(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(NetsimError, match=f"`neighbor_labels` .*{message}"):
        neighbor_vote(torch.tensor([[0.3, 0.1]]), labels)
