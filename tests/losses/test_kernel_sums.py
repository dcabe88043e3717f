"""Sums of similarities without their pairs: identities of the paper, derivatives by `gradcheck`, and symmetries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.functional import pairwise_similarity
from lightning_netsim.functional.similarity import group_mean_similarity
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian, per_sample_jacobian
from lightning_netsim.losses.kernel_sums import kernel_energies, kernel_sums, pair_similarity
from tests import cases, oracles


def jacobian(name: str, directions: Any = "all", dtype: torch.dtype = torch.float64) -> PerSampleJacobian:
    model, inputs = cases.build(name)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return per_sample_jacobian(model.to(dtype), inputs, directions)


NAMES = ["mlp_10", "conv2d", "conv2d_groups_2", "embedding", "positions", "transposed2d", "gru", "softmax", "layer_norm"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("directions", ["all", 1])
@pytest.mark.parametrize("name", NAMES)
def test_sums_and_energies_are_those_of_the_pairs(name: str, directions: Any, dtype: torch.dtype) -> None:
    result = jacobian(name, directions, dtype)
    matrix = JacobianOperator(nn.Linear(1, 1), directions=directions).directions.matrix(result.outputs.shape[1])
    dense = oracles.loop_jacobian(*cases.build(name))
    k = oracles.dense_similarity(dense if matrix is None else matrix.mT @ dense, 1e-12 if dtype == torch.float64 else 1e-6)
    tolerance = 1e-10 if dtype == torch.float64 else (1e-3 if name == "softmax" else 1e-4)
    weights = torch.randn(len(k), 3, dtype=torch.float64)
    sums, energies = kernel_sums(result, weights.to(dtype)), kernel_energies(result, weights.to(dtype))
    assert sums.dtype == energies.dtype == dtype
    torch.testing.assert_close(sums.double(), k @ weights, rtol=0, atol=tolerance)
    torch.testing.assert_close(energies.double(), (weights * (k @ weights)).sum(0), rtol=0, atol=tolerance)
    other = torch.randperm(len(k))
    pairs = pair_similarity(result, result.select(other))
    torch.testing.assert_close(pairs.double(), k[torch.arange(len(k)), other], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_similarity_and_the_variance_of_a_group(name: str) -> None:
    result = jacobian(name)
    n = result.num_samples
    squared_norm = kernel_energies(result, torch.full((n, 1), 1 / n, dtype=torch.float64))
    k = pairwise_similarity(result.materialize())
    different = k[~torch.eye(n, dtype=torch.bool)].mean()
    torch.testing.assert_close(group_mean_similarity(squared_norm, n)[0], different, rtol=0, atol=1e-10)
    # Unit vectors by hand: for one direction, the gradient over its norm.
    dense = jacobian(name, 1).materialize()[:, 0]
    unit = dense / dense.square().sum(1, keepdim=True).sqrt()
    variance = (unit - unit.mean(0)).square().sum(1).mean()
    squared_norm = kernel_energies(jacobian(name, 1), torch.full((n, 1), 1 / n, dtype=torch.float64))
    torch.testing.assert_close(variance, 1 - squared_norm[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(unit.mean(0).square().sum(), squared_norm[0], rtol=0, atol=1e-10)


def test_the_soft_counts_of_groups_add_up() -> None:
    result = jacobian("mlp_10")
    members = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 2, 2])).double()
    by_group = kernel_sums(result, members)
    torch.testing.assert_close(by_group.sum(1), kernel_sums(result, torch.ones(7, 1).double())[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close((by_group * members).sum(0), kernel_energies(result, members), rtol=0, atol=1e-10)
    singles = kernel_sums(result, torch.eye(7).double())
    torch.testing.assert_close(singles, singles.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(singles.diagonal(), torch.ones(7).double(), rtol=0, atol=1e-10)


def _sums(result: PerSampleJacobian) -> Tensor:
    weights = torch.arange(result.num_samples * 2, dtype=torch.float64).view(-1, 2).sin()
    return kernel_sums(result, weights)


def _energies(result: PerSampleJacobian) -> Tensor:
    weights = torch.arange(result.num_samples * 2, dtype=torch.float64).view(-1, 2).sin()
    return kernel_energies(result, weights)


def _pairs(result: PerSampleJacobian) -> Tensor:
    n = result.num_samples
    return pair_similarity(result.select(torch.arange(n)), result.select(torch.arange(n).roll(1)))


def small_convolution() -> cases.Case:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), torch.randn(3, 1, 3, 3)


def small_linear() -> cases.Case:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(3, 2)


def small_embedding() -> cases.Case:
    model = nn.Sequential(nn.Embedding(4, 2), cases.Lambda(lambda h: h.tanh().sum(1)), nn.Linear(2, 2))
    return model, torch.tensor([[1, 2], [3, 0], [2, 2]])


@pytest.mark.parametrize("directions", ["all", 1])
@pytest.mark.parametrize("build", [small_convolution, small_linear, small_embedding])
@pytest.mark.parametrize("function", [_sums, _energies, _pairs])
def test_gradcheck_through_the_parameters(
    function: Callable[[PerSampleJacobian], Tensor], build: Callable[[], cases.Case], directions: Any
) -> None:
    torch.manual_seed(2)
    model, inputs = build()
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    operator = JacobianOperator(model, directions=directions, create_graph=True)
    # `gradcheck` moves the parameters in place.
    parameters = tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda *_: function(operator(inputs)), parameters, rtol=1e-4, atol=1e-7)


def test_weights_are_constant() -> None:
    result = jacobian("mlp_2")
    weights = torch.ones(7, 1, dtype=torch.float64, requires_grad=True)
    assert not kernel_sums(result, weights).requires_grad
    assert not kernel_energies(result, weights).requires_grad


def network(seed: int, dimensions: int = 4) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(dimensions, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_the_size_and_the_basis_of_gradients_do_not_count(seed: int, scales: list[float]) -> None:
    """φ(x) does not change under G -> G A for an invertible A with A Aᵀ a multiple of the identity: scale and rotation."""
    generator = torch.Generator().manual_seed(seed)
    x, weights = (torch.randn(6, size, dtype=torch.float64, generator=generator) for size in (4, 2))
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    result = JacobianOperator(network(seed))(x)
    mixed = result.mix(torch.tensor(scales, dtype=torch.float64)[:, None, None] * rotation)
    torch.testing.assert_close(kernel_sums(mixed, weights), kernel_sums(result, weights), rtol=0, atol=1e-8)


def test_a_second_derivative_is_refused() -> None:
    model, inputs = cases.build("mlp_2")
    jacobian = JacobianOperator(model, create_graph=True)(inputs)
    for sums in (kernel_sums, kernel_energies):
        total = sums(jacobian, torch.ones(len(inputs), 1)).square().sum()
        with pytest.raises(NetsimError, match="`create_graph` to be False"):
            torch.autograd.grad(total, list(model.parameters()), create_graph=True, allow_unused=True)
