"""Counts and neighbors from tiles, against the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.estimators.neighbor_table import AllPairs, settle_ties
from lightning_netsim.functional.results import KernelNeighborsResult


def matrix(number: int, seed: int) -> Tensor:
    unit = torch.nn.functional.normalize(torch.randn(number, 3, generator=torch.Generator().manual_seed(seed)), dim=1)
    return unit @ unit.mT


@settings(max_examples=30, deadline=None)
@given(number=st.integers(4, 30), size=st.integers(1, 31), seed=st.integers(0, 5))
def test_tiles_on_and_above_the_diagonal_give_every_row(number: int, size: int, seed: int) -> None:
    similarity, ids = matrix(number, seed), 3 * torch.arange(number) + 1
    pairs = AllPairs(number, 3, thresholds=(0.2, 0.8), powers=(2.0,))
    parts = torch.arange(number).split(size)
    for place, rows in enumerate(parts):
        for columns in parts[place:]:
            tile = similarity[rows][:, columns]
            pairs.offer(tile, ids[columns], rows, ids[rows])
            if columns is not rows:
                pairs.offer(tile.mT, ids[rows], columns, ids[columns])
    for tau, count in pairs.hard.items():
        assert torch.equal(count, (similarity >= tau).sum(1).float())
    torch.testing.assert_close(pairs.power[2.0], similarity.clamp_min(0).square().sum(1))
    others = similarity.clone().fill_diagonal_(-2)
    assert torch.equal(pairs.neighbors().similarity, others.topk(3).values)
    assert torch.equal(pairs.neighbors().index, ids[others.topk(3).indices])


def test_duplicates_are_in_the_order_of_their_ids_whatever_the_rounding() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.9 - 1e-7, 0.9 + 1e-7, 0.3]])
    pairs = AllPairs(1, 3)
    pairs.offer(similarity, torch.tensor([4, 3, 1, 2, 0]))
    assert pairs.neighbors().index.tolist() == [[1, 2, 3]]
    values = pairs.neighbors().similarity[0]
    assert bool((values[:-1] >= values[1:]).all())


def test_ties_across_the_last_place_take_the_lowest_ids() -> None:
    pairs = AllPairs(1, 2)
    for ids in ([5, 4], [3, 2], [1, 0]):
        pairs.offer(torch.ones(1, 2), torch.tensor(ids))
    assert pairs.neighbors().index.tolist() == [[0, 1]]


def test_missing_neighbors_stay_behind() -> None:
    found = KernelNeighborsResult(torch.tensor([[0.5, 0.5, torch.nan]]), torch.tensor([[7, 2, -1]]), 1.0)
    settled = settle_ties(found, 3)
    assert settled.index.tolist() == [[2, 7, -1]]
    assert settled.similarity[0, 2].isnan()


@pytest.mark.parametrize(("arguments", "name"), [({"thresholds": (1.5,)}, "thresholds"), ({"powers": (0,)}, "powers")])
def test_refusals(arguments: dict[str, tuple[float]], name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `{name}` to be numbers within"):
        AllPairs(3, 1, **arguments)
