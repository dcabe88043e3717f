"""Neighbors and counts against a full sort of the whole matrix, however the similarities are cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.estimators import NeighborTable
from lightning_netsim.estimators.neighbor_table import AllPairs

# Few values, so that ties are common, also at the k-th place.
VALUES = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, math.nan])


def full_sort(similarity: list[list[float]], ids: list[int], k: int, exclude: list[int]) -> tuple[list[list[int]], Tensor]:
    """Return ids and similarities of the first k by (similarity descending, id ascending)."""
    index, values = [], []
    for row, own in zip(similarity, exclude, strict=True):
        pairs = [(-value, label) for value, label in zip(row, ids, strict=True) if label != own and not math.isnan(value)]
        first = sorted(pairs)[:k]
        missing = k - len(first)
        index.append([label for _, label in first] + [-1] * missing)
        values.append([-value for value, _ in first] + [math.nan] * missing)
    return index, torch.tensor(values).reshape(len(similarity), k)


@st.composite
def tables(draw: Callable[[st.SearchStrategy[object]], object]) -> dict[str, object]:
    number = draw(st.integers(1, 5))
    size = draw(st.integers(0, 14))
    ids = draw(st.permutations(range(3, 3 + size)))
    row = st.lists(VALUES, min_size=size, max_size=size)
    tile = st.lists(st.integers(0, size), max_size=4)
    return {
        "similarity": draw(st.lists(row, min_size=number, max_size=number)),
        "ids": ids,
        "k": draw(st.integers(1, 6)),
        "exclude": draw(st.lists(st.integers(2, 8), min_size=number, max_size=number)),
        "cuts": sorted(draw(tile)),  # type: ignore[type-var]
        "row_cut": draw(st.integers(0, number)),
        "order": draw(st.randoms(use_true_random=False)),
        "own_ids": draw(st.booleans()),
    }


@given(case=tables())
def test_any_tiles_in_any_order_give_the_sorted_table(case: dict) -> None:
    number, ids = len(case["similarity"]), torch.tensor(case["ids"]).long()
    similarity = torch.tensor(case["similarity"]).reshape(number, len(ids))
    exclude = torch.tensor(case["exclude"])
    table = NeighborTable(number, case["k"])
    columns = [slice(a, b) for a, b in zip([0, *case["cuts"]], [*case["cuts"], len(ids)], strict=True)]
    rows = [torch.arange(number)[: case["row_cut"]], torch.arange(number)[case["row_cut"] :].flip(0)]
    tiles = [(some, part) for some in rows for part in columns]
    case["order"].shuffle(tiles)
    for some, part in tiles:
        offered = ids[part].expand(len(some), -1) if case["own_ids"] else ids[part]
        table.offer(similarity[some][:, part], offered, some, exclude[some])
    result = table.result()
    index, values = full_sort(case["similarity"], case["ids"], case["k"], case["exclude"])
    assert result.index.tolist() == index
    assert torch.equal(result.similarity.nan_to_num(9), values.nan_to_num(9))
    assert torch.equal(table.kth(), values[:, -1].nan_to_num(-math.inf))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeighborTable(0, 1), "`num_queries` to be a positive int"),
        (lambda: NeighborTable(1, 1.5), "`k` to be a positive int"),  # type: ignore[arg-type]
        (lambda: AllPairs(3, 1, thresholds=(1.5,)), "`thresholds` to be numbers within"),
        (lambda: AllPairs(3, 1, powers=(0,)), "`powers` to be numbers within"),
    ],
)
def test_settings_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        make()


@pytest.mark.parametrize(
    ("shape", "ids", "rows", "exclude", "complaint"),
    [
        ((3, 4), torch.arange(4), None, None, r"`similarity` to be of shape \(2, n\), .* but got shape \(3, 4\)"),
        ((2, 4), torch.arange(4), torch.tensor([0]), None, r"`similarity` to be of shape \(1, n\)"),
        ((2, 4), torch.arange(3), None, None, r"`ids` to be an int64 tensor of shape \(4,\) or \(2, 4\)"),
        ((2, 4), torch.arange(4), None, torch.arange(3), r"`exclude` to be of shape \(2,\)"),
    ],
)
def test_shapes_are_refused(
    shape: tuple[int, ...], ids: Tensor, rows: Tensor | None, exclude: Tensor | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        NeighborTable(2, 1).offer(torch.rand(shape), ids, rows, exclude)


# Counts of all pairs, and ties up to rounding


@settings(max_examples=20, deadline=None)
@given(number=st.integers(4, 20), size=st.integers(1, 21), seed=st.integers(0, 5))
def test_tiles_on_and_above_the_diagonal_give_every_row(number: int, size: int, seed: int) -> None:
    rows = torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(rows, dim=1)
    similarity, ids = unit @ unit.mT, 3 * torch.arange(number) + 1
    tau = float(similarity[0, 1])  # A pair as similar as that counts.
    pairs = AllPairs(number, 3, thresholds=(tau, 0.8), powers=(2.0,))
    parts = torch.arange(number).split(size)
    for place, rows in enumerate(parts):
        for columns in parts[place:]:
            tile = similarity[rows][:, columns]
            pairs.offer(tile, ids[columns], rows, ids[rows])
            if columns is not rows:
                pairs.offer(tile.mT, ids[rows], columns, ids[columns])
    for threshold, count in pairs.hard.items():
        assert torch.equal(count, (similarity >= threshold).sum(1).float())
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
    across = AllPairs(1, 2)
    for ids in ([5, 4], [3, 2], [1, 0]):
        across.offer(torch.ones(1, 2), torch.tensor(ids))
    assert across.neighbors().index.tolist() == [[0, 1]]
