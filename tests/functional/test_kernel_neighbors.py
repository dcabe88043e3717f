"""Exact kernel neighbors against a sort of the dense matrix of similarities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import kernel_neighbors

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def unit_features(seed: int, n: int, k: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    features = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=1).to(dtype)


def with_duplicates(seed: int, n: int, distinct: int, k: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(seed))
    return unit_features(seed, distinct, k, dtype)[rows]


def dense_neighbors(query: Tensor, reference: Tensor | None, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sort every row by (-similarity, index) in plain python; similarities to 1e-9, so that duplicates tie."""
    others = query if reference is None else reference
    indices, similarities = [], []
    for i, x in enumerate(query.double()):
        pairs = [(-round(float((x * y).sum()), 9), j) for j, y in enumerate(others.double()) if reference is not None or i != j]
        best = sorted(pairs)[:k]
        indices.append([j for _, j in best])
        similarities.append([-negative for negative, _ in best])
    return indices, similarities


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 14),
    distinct=st.integers(1, 14),
    chunk_size=st.integers(1, 15),
    single=st.booleans(),
    data=st.data(),
)
def test_neighbors_against_a_dense_sort_with_ties(
    seed: int, n: int, distinct: int, chunk_size: int, single: bool, data: st.DataObject
) -> None:
    features = with_duplicates(seed, n, distinct, dtype=torch.float32 if single else torch.float64)
    k = data.draw(st.integers(1, n - 1))
    result = kernel_neighbors(features, k=k, chunk_size=chunk_size)
    index, similarity = dense_neighbors(features, None, k)
    assert result.index.tolist() == index
    torch.testing.assert_close(result.similarity, torch.tensor(similarity), rtol=0, atol=1e-6)
    assert result.recall == 1.0


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_neighbors_in_another_set(chunk_size: int, k: int) -> None:
    query, reference = with_duplicates(0, 7, 5), with_duplicates(1, 9, 4)
    reference[3] = query[2]
    result = kernel_neighbors(query, reference, k, chunk_size)
    index, similarity = dense_neighbors(query, reference, k)
    assert result.index.tolist() == index
    torch.testing.assert_close(result.similarity, torch.tensor(similarity), rtol=0, atol=1e-6)
    assert result.index[2, 0] == 3  # A sample found in another set is its own neighbor there.


def test_many_duplicates_and_features_tie_whatever_the_chunk_size() -> None:
    features = with_duplicates(2, 80, 9, k=257, dtype=torch.float32)
    expected = kernel_neighbors(features, k=40)
    assert expected.index.tolist() == dense_neighbors(features, None, 40)[0]
    for chunk_size in (17, 64, 79):
        result = kernel_neighbors(features, k=40, chunk_size=chunk_size)
        assert torch.equal(result.index, expected.index)
        assert torch.equal(result.similarity, expected.similarity)


def test_a_collapsed_network_gives_the_lowest_indices() -> None:
    result = kernel_neighbors(torch.ones(6, 4) / 2, k=3, chunk_size=2)
    assert result.index.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert result.similarity.tolist() == [[1.0] * 3] * 6


@PROPERTY
@given(seed=st.integers(0, 2**31), n=st.integers(2, 12))
def test_permutation_equivariance(seed: int, n: int) -> None:
    features = unit_features(seed, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    straight, permuted = kernel_neighbors(features, k=n - 1), kernel_neighbors(features[order], k=n - 1)
    assert torch.equal(order[permuted.index], straight.index[order])
    assert torch.equal(permuted.similarity, straight.similarity[order])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("chunk_size", [2, 100])
def test_left_out_rows_have_no_neighbors_and_are_nobodys(bad: float, chunk_size: int) -> None:
    features = unit_features(3, 6)
    keep = torch.tensor([0, 2, 3, 5])
    expected = kernel_neighbors(features[keep], k=3)
    features[1], features[4] = bad, bad
    result = kernel_neighbors(features, k=4, chunk_size=chunk_size)
    assert result.index[[1, 4]].tolist() == [[-1] * 4] * 2
    assert bool(result.similarity[[1, 4]].isnan().all())
    assert torch.equal(result.index[keep, :3], keep[expected.index])
    assert torch.equal(result.similarity[keep, :3], expected.similarity)
    assert result.index[keep, 3].tolist() == [-1] * 4
    assert bool(result.similarity[keep, 3].isnan().all())


def test_no_query_and_all_of_another_set() -> None:
    features = unit_features(5, 4)
    empty = kernel_neighbors(features[:0], features, k=2)
    assert empty.index.shape == empty.similarity.shape == (0, 2)
    assert empty.index.dtype == torch.int64
    assert kernel_neighbors(features, features, k=4).index.shape == (4, 4)
