"""Neighbor counts against the dense matrix of similarities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import hard_count, neighbor_count, pairwise_similarity, power_count, soft_count
from tests.oracles import dense_similarity

TAUS, POWERS = (-0.5, 0.0, 0.5, 0.9, 1.0), (0.5, 1.0, 2.0, 4.0)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def unit_features(seed: int, n: int, k: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    features = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=1).to(dtype)


def dense_counts(query: Tensor, reference: Tensor) -> tuple[Tensor, dict[float, Tensor], dict[float, Tensor]]:
    """Count with two loops over single pairs."""
    soft = torch.zeros(len(query), dtype=torch.float64)
    hard = {tau: torch.zeros(len(query), dtype=torch.float64) for tau in TAUS}
    power = {alpha: torch.zeros(len(query), dtype=torch.float64) for alpha in POWERS}
    for i, x in enumerate(query.double()):
        for y in reference.double():
            k = float((x * y).sum())
            soft[i] += k
            for tau in TAUS:
                hard[tau][i] += k >= tau - 1e-12
            for alpha in POWERS:
                power[alpha][i] += max(k, 0.0) ** alpha
    return soft, hard, power


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1024])
@pytest.mark.parametrize("to_itself", [True, False])
def test_counts_against_the_dense_version(chunk_size: int, to_itself: bool) -> None:
    query = unit_features(0, 7)
    query[4] = query[1]
    reference = query if to_itself else unit_features(1, 10)
    result = neighbor_count(query, None if to_itself else reference, TAUS, POWERS, chunk_size)
    soft, hard, power = dense_counts(query, reference)
    torch.testing.assert_close(result.soft, soft, rtol=0, atol=1e-12)
    assert result.num_reference == len(reference)
    torch.testing.assert_close(result.fraction, soft / len(reference), rtol=0, atol=1e-12)
    assert result.hard.keys() == hard.keys()
    assert result.power.keys() == power.keys()
    for tau in TAUS:
        torch.testing.assert_close(result.hard[tau], hard[tau], rtol=0, atol=0)
    for alpha in POWERS:
        torch.testing.assert_close(result.power[alpha], power[alpha], rtol=0, atol=1e-12)


def test_single_counts_are_those_of_the_one_pass() -> None:
    query, reference = unit_features(2, 6), unit_features(3, 9)
    result = neighbor_count(query, reference, [0.3], [3])
    assert torch.equal(soft_count(query, reference), result.soft)
    assert torch.equal(hard_count(query, reference, 0.3), result.hard[0.3])
    assert torch.equal(power_count(query, reference, 3), result.power[3.0])
    assert neighbor_count(query).hard == {}
    assert neighbor_count(query).power == {}


@PROPERTY
@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), d=st.integers(1, 3), chunk_size=st.integers(1, 9))
def test_soft_count_is_the_row_sum_of_the_kernel(seed: int, n: int, d: int, chunk_size: int) -> None:
    jacobian = torch.randn(n, d, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    similarity = dense_similarity(jacobian)
    left, _, right = torch.linalg.svd(jacobian.mT, full_matrices=False)
    features = (left @ right).mT.flatten(1) / math.sqrt(d)  # G C^(-1/2) is the polar factor of G.
    torch.testing.assert_close(soft_count(features, chunk_size=chunk_size), similarity.sum(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(pairwise_similarity(jacobian).sum(1), similarity.sum(1), rtol=0, atol=1e-8)


@PROPERTY
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), m=st.integers(1, 12), chunk_size=st.integers(1, 13))
def test_chunk_size_and_order_do_not_matter(seed: int, n: int, m: int, chunk_size: int) -> None:
    query, reference = unit_features(seed, n), unit_features(seed + 1, m)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    once = neighbor_count(query, reference, TAUS, POWERS)
    again = neighbor_count(query[order], reference[other], TAUS, POWERS, chunk_size)
    torch.testing.assert_close(again.soft, once.soft[order], rtol=0, atol=1e-12)
    for tau in TAUS:
        torch.testing.assert_close(again.hard[tau], once.hard[tau][order], rtol=0, atol=0)
    for alpha in POWERS:
        torch.testing.assert_close(again.power[alpha], once.power[alpha][order], rtol=0, atol=1e-12)


def test_duplicates_reach_a_threshold_of_one_in_float32() -> None:
    features = unit_features(4, 40, k=300, dtype=torch.float32).repeat(3, 1)
    assert hard_count(features, threshold=1.0, chunk_size=16).tolist() == [3.0] * 120


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("chunk_size", [2, 1024])
def test_left_out_rows_count_nan_and_are_not_counted(bad: float, chunk_size: int) -> None:
    features = unit_features(6, 6)
    expected = neighbor_count(features[[0, 2, 3, 5]], None, TAUS, POWERS)
    features[1], features[4] = bad, bad
    result = neighbor_count(features, None, TAUS, POWERS, chunk_size)
    assert result.num_reference == 4
    for got, wanted in [
        (result.soft, expected.soft),
        *((result.hard[tau], expected.hard[tau]) for tau in TAUS),
        *((result.power[alpha], expected.power[alpha]) for alpha in POWERS),
    ]:
        assert got.isnan().tolist() == [False, True, False, False, True, False]
        torch.testing.assert_close(got[[0, 2, 3, 5]], wanted, rtol=0, atol=1e-12)


def test_soft_count_of_many_samples_keeps_its_digits_in_float32() -> None:
    features = unit_features(7, 20_000, k=8, dtype=torch.float32)
    expected = features.double() @ features.double().sum(0)
    error = (soft_count(features).double() - expected).abs() / expected.abs().clamp_min(1)
    assert float(error.max()) < 1e-6


def test_soft_and_power_counts_are_differentiable() -> None:
    features = unit_features(9, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: soft_count(f, chunk_size=2), features)
    assert torch.autograd.gradcheck(lambda f: power_count(f, power=2, chunk_size=2), features)


def test_empty_sets() -> None:
    features = unit_features(10, 3)
    assert soft_count(features[:0], features).shape == (0,)
    empty = neighbor_count(features, features[:0], [0.5], [2])
    assert empty.num_reference == 0
    assert empty.soft.tolist() == empty.hard[0.5].tolist() == empty.power[2.0].tolist() == [0.0] * 3
