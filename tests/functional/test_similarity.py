"""Criteria as functions of similarities: against loops, identities of the paper, derivatives, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import pairwise_similarity
from lightning_netsim.functional.similarity import (
    density_loss,
    group_mean_similarity,
    group_members,
    group_similarity_loss,
    minibatch_similarity_loss,
    pair_similarity_loss,
    tangent_loss,
)
from tests import oracles
from tests.functional.common import random

NAN = math.nan


def close(actual: Tensor, wanted: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(wanted, dtype=actual.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("directions", [1, 3])
def test_pairs_and_groups_against_loops(directions: int) -> None:
    jacobian, labels = random(0, 7, directions, 12), torch.tensor([4, 2, 4, 2, 9, 4, 2])
    similarity = pairwise_similarity(jacobian)
    close(group_similarity_loss(similarity, labels), oracles.group_criterion(jacobian, labels))
    first, second = [0, 2, 5, 1, 3, 6], [2, 5, 0, 3, 6, 1]
    close(pair_similarity_loss(similarity[first, second]), oracles.pair_criterion(jacobian, labels))
    close(minibatch_similarity_loss(jacobian[:2].mean(0).flatten(), jacobian[2:4].mean(0).flatten(), 2), _minibatch(jacobian))
    fraction = similarity.sum(1) / 7
    close(density_loss(fraction, 0.2, "sum"), oracles.density_criterion(jacobian, 0.2, 0.2, mean=False))
    close(density_loss(fraction, 0.2), oracles.density_criterion(jacobian, 0.2, 0.2, mean=True))
    low, high = (float(fraction.quantile(share)) for share in (0.3, 0.6))
    close(density_loss(fraction.clamp(0, 1), (low, high)), oracles.density_criterion(jacobian, low, high, mean=True))


def _minibatch(jacobian: Tensor) -> Tensor:
    return oracles.minibatch_criterion(jacobian, torch.tensor([0, 0, 0, 0, 1, 2, 3]))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_mean_similarity_of_a_group_and_its_variance(n: int) -> None:
    unit = torch.nn.functional.normalize(random(n, n, 8), dim=1)
    mean = unit.mean(0)
    k = [float(unit[i] @ unit[j]) for i in range(n) for j in range(n) if i != j]
    close(group_mean_similarity(mean.square().sum(), n), sum(k) / len(k))
    variance = sum(float((row - mean).square().sum()) for row in unit) / n
    assert variance == pytest.approx(1 - float(mean.square().sum()), abs=1e-12)
    close(group_similarity_loss(unit @ unit.mT, torch.zeros(n).long()), -sum(k) / len(k))


def test_members_of_groups() -> None:
    members = group_members(torch.tensor([5, 3, 5, -1, 3, 8, -1]))
    assert members.T.tolist() == [
        [False, True, False, False, True, False, False],
        [True, False, True, False, False, False, False],
    ]
    assert group_members(torch.tensor([1, 2])).shape == (2, 0)
    assert group_members(torch.zeros(0).long()).shape == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed: int) -> None:
    def checked(function: Callable[..., Tensor], *inputs: Tensor) -> None:
        assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs))

    checked(pair_similarity_loss, random(seed, 5))
    checked(lambda s: group_similarity_loss(s, torch.tensor([0, 1, 0, 0, 1])), random(seed, 5, 5))
    checked(lambda x: group_mean_similarity(x, torch.tensor([2, 5])), random(seed, 2))
    checked(lambda a, b: minibatch_similarity_loss(a, b, 4), random(seed, 6), random(seed + 9, 6))
    checked(lambda f: density_loss(f, 0.3), random(seed, 5))
    checked(lambda f: density_loss(f, (0.2, 0.6), "sum"), torch.tensor([0.1, 0.3, 0.5, 0.7, -0.4]).double())
    checked(tangent_loss, random(seed, 3, 2, 4))


@pytest.mark.parametrize("size", [1e-13, 1e-7, 1e7, 1e13])
def test_minibatches_do_not_depend_on_the_size_of_gradients(size: float) -> None:
    first, second = random(0, 6).float(), random(1, 6).float()
    wanted = minibatch_similarity_loss(first, second, 2)
    torch.testing.assert_close(minibatch_similarity_loss(size * first, size * second, 2), wanted, rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(6)), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_neither_order_nor_size_of_gradients_counts(seed: int, order: list[int], scales: list[float]) -> None:
    jacobian, labels = random(seed, 6, 2, 9), torch.tensor([0, 1, 0, 1, 0, 2])
    similarity = pairwise_similarity(jacobian)
    other = pairwise_similarity((jacobian * torch.tensor(scales).double()[:, None, None])[order])
    close(group_similarity_loss(other, labels[order]), group_similarity_loss(similarity, labels), 1e-9)
    close(density_loss(other.mean(1), 0.4), density_loss(similarity.mean(1), 0.4), 1e-9)
    assert -1 <= float(group_similarity_loss(similarity, labels)) <= 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1, 2), min_size=1, max_size=8),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda t: tuple(sorted(t))),
)
def test_density_is_zero_within_the_range_alone(fractions: list[float], bounds: tuple[float, float]) -> None:
    fraction = torch.tensor(fractions, dtype=torch.float64)
    low, high = bounds
    wanted = sum(max(low - f, 0, f - high) ** 2 for f in fractions)
    close(density_loss(fraction, bounds, "sum"), wanted, 1e-12)
    close(density_loss(fraction, bounds), wanted / len(fractions), 1e-12)


def test_what_is_nan_is_left_out_as_if_absent() -> None:
    similarity = torch.tensor([0.5, NAN, 1.0], dtype=torch.float64, requires_grad=True)
    loss = pair_similarity_loss(similarity)
    close(loss, -0.75)
    assert torch.autograd.grad(loss, similarity)[0].tolist() == [-0.5, 0.0, -0.5]
    fraction = torch.tensor([0.5, NAN, 0.9], dtype=torch.float64, requires_grad=True)
    loss = density_loss(fraction, 0.7)
    close(loss, 0.04)
    assert torch.autograd.grad(loss, fraction)[0].tolist() == pytest.approx([-0.2, 0.0, 0.2])
    jacobian, labels = random(3, 5, 2, 9), torch.tensor([0, 0, 0, 1, 1])
    jacobian[1] = NAN
    jacobian.requires_grad_()
    loss = group_similarity_loss(pairwise_similarity(jacobian), labels)
    kept = [0, 2, 3, 4]
    close(loss, group_similarity_loss(pairwise_similarity(jacobian[kept]), labels[kept]))
    gradient = torch.autograd.grad(loss, jacobian)[0]
    alone = torch.autograd.grad(group_similarity_loss(pairwise_similarity(jacobian[kept]), labels[kept]), jacobian)[0]
    close(gradient[kept], alone[kept])


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "no pair": lambda x: pair_similarity_loss(x[:0, 0]),
    "pairs of NaN": lambda x: pair_similarity_loss(x[:, 0] * NAN),
    "no sample": lambda x: group_similarity_loss(x[:0, :0], torch.zeros(0).long()),
    "one sample": lambda x: group_similarity_loss(x[:1, :1], torch.zeros(1).long()),
    "no label twice": lambda x: group_similarity_loss(x, torch.arange(4)),
    "all left out": lambda x: group_similarity_loss(x * NAN, torch.zeros(4).long()),
    "a mean of zero": lambda x: minibatch_similarity_loss(x[0] * 0, x[1], 2),
    "a mean of NaN": lambda x: minibatch_similarity_loss(x[0], x[1] * NAN, 2),
    "an infinite mean": lambda x: minibatch_similarity_loss(x[0], x[1] * math.inf, 2),
    "no fraction": lambda x: density_loss(x[:0, 0], 0.3),
    "fractions of NaN": lambda x: density_loss(x[0] * NAN, 0.3),
    "no derivative": lambda x: tangent_loss(x[:0, :, None]),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_be_compared_there_is_a_zero_with_a_graph(name: str) -> None:
    x = random(5, 4, 4).requires_grad_()
    loss = NOTHING[name](x)
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    assert loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, x)
    assert not gradient.nan_to_num().any()
