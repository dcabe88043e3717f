"""Averages over kernel neighbors: the oracle, the identities of the paper, simulated noise, and the Lipschitz constant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_netsim.functional import (
    denoising_bound,
    denoising_factor,
    denoising_weights,
    kernel_matrix,
    lipschitz_constant,
    neighbor_consistency,
    smooth,
)
from tests.denoising_oracles import Denoised, by_matrices, by_outputs, paper_constant
from tests.functional.test_kernel import network, random_jacobian, random_orthogonal
from tests.oracles import loop_jacobian

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def kernel_of(queries: Tensor, reference: Tensor) -> Tensor:
    """Return K of all pairs, shape (Q, N, D, D), or (Q, N) of one output."""
    kernel = torch.einsum("qap,nbp->qnab", queries, reference)
    return kernel[..., 0, 0] if kernel.shape[2] == 1 else kernel


def gradients(number: int, outputs: int, seed: int = 0) -> Tensor:
    """Return gradients that have much in common, shape (N, D, P), so that no sum of kernels is close to singular."""
    common = random_jacobian(seed, 1, outputs, 12)
    return common + random_jacobian(seed + 1, number, outputs, 12) / 3


def values(number: int, outputs: int, seed: int = 5) -> Tensor:
    return random_jacobian(seed, 1, number, outputs)[0]


# The oracle


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("queries", [None, 3])
def test_against_the_oracle(outputs: int, queries: int | None) -> None:
    reference = gradients(7, outputs)
    asked = reference if queries is None else gradients(queries, outputs, seed=7)
    targets, fitted, own = values(7, outputs), values(7, outputs, 6), values(len(asked), outputs, 7)
    wanted: Denoised = by_matrices(asked, reference, targets, fitted, own)
    kernel = kernel_of(asked, reference)
    weights = denoising_weights(kernel)
    assert weights.shape == kernel.shape
    torch.testing.assert_close(weights.reshape(wanted.weights.shape), wanted.weights, **EXACT)
    torch.testing.assert_close(smooth(weights, targets), wanted.smoothed_targets, **EXACT)
    torch.testing.assert_close(denoising_factor(weights), wanted.factor, **EXACT)
    torch.testing.assert_close(neighbor_consistency(weights, own, fitted), wanted.consistency, **EXACT)


def test_single_output_with_negative_kernels_put_to_zero() -> None:
    reference, lipschitz = random_jacobian(0, 7, 1), 1.7
    asked = torch.cat([reference[:3], random_jacobian(3, 2, 1)])
    targets, fitted, own = values(7, 1), values(7, 1, 6), values(5, 1, 7)
    wanted = by_outputs(asked, reference, targets, fitted, own)
    assert wanted.clamped is not None
    assert wanted.spread is not None
    assert float(wanted.clamped) > 0.2
    weights = denoising_weights(kernel_of(asked, reference), clamp=True)
    torch.testing.assert_close(weights, wanted.weights[..., 0], **EXACT)
    torch.testing.assert_close(smooth(weights, targets), wanted.smoothed_targets, **EXACT)
    torch.testing.assert_close(denoising_factor(weights), wanted.factor, **EXACT)
    torch.testing.assert_close(neighbor_consistency(weights, own, fitted), wanted.consistency, **EXACT)
    cosine = torch.nn.functional.normalize(asked[:, 0], dim=1) @ torch.nn.functional.normalize(reference[:, 0], dim=1).mT
    bound = denoising_bound(weights, cosine, lipschitz)
    # The root of a rounding error of 1e-16 is 1e-8: that of a sample with itself.
    torch.testing.assert_close(bound, math.sqrt(2) * lipschitz * wanted.spread[:, 0], rtol=1e-8, atol=1e-7)


def test_a_direction_that_no_sample_has_is_left_out() -> None:
    """Outputs that sum to one: the sum of the kernels has no inverse, and the average keeps to the others."""
    reference = gradients(6, 3)
    reference = reference - reference.mean(1, keepdim=True)
    targets = values(6, 3)
    wanted = by_matrices(reference, reference, targets, targets, targets, floor=1e-9)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        weights = denoising_weights(kernel_matrix(reference).to(dtype))
        torch.testing.assert_close(smooth(weights, targets).double(), wanted.smoothed_targets, rtol=0, atol=tolerance)
        torch.testing.assert_close(denoising_factor(weights).double(), wanted.factor, rtol=tolerance, atol=0)
        constant = smooth(weights, torch.ones(6, 1, dtype=dtype) * torch.tensor([1.0, -3.0, 2.0], dtype=dtype))
        torch.testing.assert_close(constant.double(), torch.tensor([[1.0, -3.0, 2.0]] * 6).double(), rtol=0, atol=tolerance)


def test_queries_without_a_kernel_are_nan() -> None:
    kernel = torch.tensor([[1.0, 3.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, -1.0]])
    weights = denoising_weights(kernel)
    torch.testing.assert_close(weights[0], torch.tensor([0.25, 0.75]))
    assert bool(weights[1:].isnan().all())
    torch.testing.assert_close(denoising_weights(kernel[4:], clamp=True), torch.tensor([[1.0, 0.0]]))
    assert bool(denoising_weights(-kernel[:1], clamp=True).isnan().all())
    assert denoising_factor(weights).isnan().tolist() == [False, True, True, True, True]
    matrix = torch.einsum("qn,ab->qnab", kernel, torch.eye(2))
    assert denoising_weights(matrix)[:, 0, 0, 0].isnan().tolist() == [False, True, True, True, True]


# Identities of the paper


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_all_samples_alike_average_all_labels(outputs: int) -> None:
    jacobian, targets = random_jacobian(0, 1, outputs).expand(9, -1, -1), values(9, outputs)
    weights = denoising_weights(kernel_of(jacobian, jacobian))
    torch.testing.assert_close(denoising_factor(weights), torch.full((9,), 1 / 3, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(smooth(weights, targets), targets.mean(0).expand(9, -1), **EXACT)
    single = torch.eye(outputs, dtype=torch.float64).expand(9, 9, -1, -1) / 9
    torch.testing.assert_close(weights.reshape(single.shape), single, **EXACT)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_independent_samples_keep_their_labels(outputs: int) -> None:
    rows = torch.linalg.qr(random_jacobian(0, 1, 6 * outputs, 6 * outputs)[0]).Q.reshape(6, outputs, -1)
    jacobian, targets = random_jacobian(1, 6, outputs, outputs) @ rows, values(6, outputs)
    weights = denoising_weights(kernel_of(jacobian, jacobian))
    torch.testing.assert_close(denoising_factor(weights), torch.ones(6, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(smooth(weights, targets), targets, **EXACT)
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(neighbor_consistency(weights, targets, targets), zero, **EXACT)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(1, 8), outputs=st.integers(1, 3), seed=st.integers(0, 1000))
def test_properties_of_the_weights(number: int, outputs: int, seed: int) -> None:
    jacobian, targets = gradients(number, outputs, seed), values(number, outputs, seed)
    kernel = kernel_matrix(jacobian)
    weights = denoising_weights(kernel)
    identity = torch.eye(outputs, dtype=torch.float64).expand(number, -1, -1)
    torch.testing.assert_close(weights.sum(1), identity, **EXACT)
    torch.testing.assert_close(denoising_weights(7.0 * kernel), weights, **EXACT)
    factor, smoothed = denoising_factor(weights), smooth(weights, targets)
    assert bool((factor >= number**-0.5 - 1e-12).all())
    # Another order of the samples, of queries and of the reference set.
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    permuted = denoising_weights(kernel[order][:, order])
    torch.testing.assert_close(permuted, weights[order][:, order], **EXACT)
    torch.testing.assert_close(smooth(permuted, targets[order]), smoothed[order], **EXACT)
    # Other outputs, y → Q y.
    rotation = random_orthogonal(seed, outputs)
    rotated = denoising_weights(kernel_matrix(rotation @ jacobian))
    torch.testing.assert_close(smooth(rotated, targets @ rotation.mT), smoothed @ rotation.mT, **EXACT)
    torch.testing.assert_close(denoising_factor(rotated), factor, **EXACT)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(1, 8), seed=st.integers(0, 1000))
def test_weights_of_clamped_kernels_are_distributions(number: int, seed: int) -> None:
    jacobian, targets = random_jacobian(seed, number, 1, 4), values(number, 1, seed)
    weights = denoising_weights(kernel_of(jacobian, jacobian), clamp=True)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(number, dtype=torch.float64), **EXACT)
    factor, smoothed = denoising_factor(weights), smooth(weights, targets)
    assert bool(((factor >= number**-0.5 - 1e-12) & (factor <= 1 + 1e-12)).all())
    assert bool(((smoothed >= targets.min() - 1e-12) & (smoothed <= targets.max() + 1e-12)).all())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_responses_to_each_label_by_itself_add_up_to_the_factor_squared(outputs: int) -> None:
    """Hence the variance of smoothed noise, without chance."""
    jacobian = gradients(6, outputs)
    weights = denoising_weights(kernel_of(jacobian, jacobian))
    single = torch.eye(6 * outputs, dtype=torch.float64).reshape(-1, 6, outputs)
    responses = torch.stack([smooth(weights, label).square().sum(1) for label in single]).sum(0) / outputs
    torch.testing.assert_close(responses, denoising_factor(weights).square(), **EXACT)


# The Lipschitz constant and the bound


def head_and_norms(model: nn.Sequential, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the last layer, what goes into it, and the gradients, shape (N, D, P)."""
    with torch.no_grad():
        activations = model[:-1](inputs)
    head: Any = model[-1]
    return head.weight.detach(), activations, loop_jacobian(model, inputs)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("outputs", "scale", "seed"), [(1, 1.0, 0), (1, 0.05, 1), (1, 8.0, 2), (3, 1.0, 3)])
def test_outputs_are_lipschitz_in_the_unit_gradient(activation: type[nn.Module], outputs: int, scale: float, seed: int) -> None:
    model, inputs = network(seed, outputs, activation), scale * random_jacobian(seed, 1, 40, 4)[0]
    with torch.no_grad():
        fitted = model(inputs)
    weight, activations, jacobian = head_and_norms(model, inputs)
    constant = lipschitz_constant(weight, activations.norm(dim=1), jacobian.norm(dim=2))
    by_hand = [
        float(weight[o].norm()) * float(jacobian[:, o].norm(dim=1).max()) * (1 + float(activations.norm(dim=1).max()))
        for o in range(outputs)
    ]
    torch.testing.assert_close(constant, torch.tensor(by_hand, dtype=torch.float64), **EXACT)
    assert bool((constant <= paper_constant(weight, activations, jacobian)).all())
    unit = torch.nn.functional.normalize(jacobian, dim=2)
    for o in range(outputs):
        moved = (fitted[:, None, o] - fitted[None, :, o]).abs()
        assert bool((moved <= constant[o] * (unit[:, None, o] - unit[None, :, o]).norm(dim=2) + 1e-12).all())
        # Hence the bound, for weights that are a distribution.
        kernel = jacobian[:, o] @ jacobian[:, o].mT
        weights = denoising_weights(kernel, clamp=True)
        distance = neighbor_consistency(weights, fitted[:, o : o + 1], fitted[:, o : o + 1])
        bound = denoising_bound(weights, unit[:, o] @ unit[:, o].mT, float(constant[o]))
        assert bool((distance <= bound + 1e-12).all())


def test_rounding_above_one_gives_no_nan() -> None:
    similarity = torch.tensor([[1.0 + 1e-6, 0.0, -1.0]])
    bound = denoising_bound(torch.tensor([[0.5, 0.25, 0.25]]), similarity, lipschitz=1.0)
    torch.testing.assert_close(bound, torch.tensor([math.sqrt(2) * (0.25 + 0.25 * math.sqrt(2))]))


# Bad input
