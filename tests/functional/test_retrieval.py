"""Figures of retrieval against loops over queries and their neighbors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

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


def test_missing_neighbors_do_not_vote() -> None:
    similarity, labels = torch.tensor([[0.1, math.nan, math.nan]]), torch.tensor([[1, -1, 0]])
    assert neighbor_vote(similarity, labels).tolist() == [1]


def test_nothing_to_judge() -> None:
    none = torch.zeros(0, 3, dtype=torch.bool)
    assert recall_at_k(none, 2).isnan()
    assert mean_average_precision_at_r(none, torch.zeros(0, dtype=torch.int64)).isnan()
    assert mean_average_precision_at_r(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)).isnan()
    assert neighbor_vote(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
