"""The kernel of wide random ReLU networks: its closed form, its slope at the ends, and the networks that it is the limit of."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_netsim.functional import arc_cosine, arc_cosine_kernel
from tests import oracles
from tests.functional.common import random

DEPTHS = pytest.mark.parametrize("depth", [1, 2, 7])
COSINES = (-1.0, -1 + 1e-9, -0.99, -0.5, 0.0, 0.3, 0.99, 1 - 1e-9, 1.0)


@DEPTHS
def test_value_and_slope_against_the_closed_form(depth: int) -> None:
    cosine = torch.tensor(COSINES, dtype=torch.float64).requires_grad_()
    found = arc_cosine(cosine, depth)
    (slope,) = torch.autograd.grad(found.sum(), cosine)
    wanted = torch.tensor([oracles.arc_cosine(c, depth) for c in COSINES], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), wanted[:, 0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, wanted[:, 1], rtol=1e-9, atol=1e-14)


def test_values_known_by_heart() -> None:
    cosine = torch.tensor([-1.0, 0.0, 1.0, math.sqrt(0.5)], dtype=torch.float64)
    eighth = math.sqrt(0.5) / math.pi * (1 + 3 * math.pi / 4)  # θ = π/4.
    torch.testing.assert_close(arc_cosine(cosine), torch.tensor([0, 1 / math.pi, 1, eighth]).double(), rtol=1e-7, atol=1e-15)
    # (sin θ + (π − θ) cos θ)/π with cos θ = 1/π.
    second = (math.sqrt(1 - math.pi**-2) + (math.pi - math.acos(1 / math.pi)) / math.pi) / math.pi
    assert arc_cosine(cosine, 2)[:3].tolist() == pytest.approx([1 / math.pi, second, 1], abs=1e-15)


@DEPTHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_slope_at_the_ends_is_finite_and_right(dtype: torch.dtype, depth: int) -> None:
    cosine = torch.tensor([-1.0, 1.0], dtype=dtype).requires_grad_()
    (slope,) = torch.autograd.grad(arc_cosine(cosine, depth).sum(), cosine)
    assert slope.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_what_rounding_put_outside_is_the_end() -> None:
    cosine = torch.tensor([-1 - 1e-6, 1 + 1e-6]).requires_grad_()
    value = arc_cosine(cosine)
    assert value.tolist() == pytest.approx([0, 1], abs=1e-7)
    assert bool(torch.isfinite(torch.autograd.grad(value.sum(), cosine)[0]).all())


@DEPTHS
def test_gradcheck(depth: int) -> None:
    cosine = torch.linspace(-0.99, 0.99, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: arc_cosine(c, depth), (cosine,))
    x, y = random(1, 3, 4).requires_grad_(), random(2, 2, 4).requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, n=normalize: arc_cosine_kernel(a, b, depth, n), (x, y))


def test_it_falls_with_the_angle_and_rises_with_depth() -> None:
    cosine = torch.linspace(-1, 1, 201, dtype=torch.float64)
    layers = torch.stack([cosine, *(arc_cosine(cosine, depth) for depth in range(1, 8))])
    assert bool((layers.diff(dim=1) > 0).all())
    assert bool((layers.diff(dim=0)[:, :-1] > 0).all())
    assert layers[:, -1].tolist() == [1.0] * 8


def test_wide_random_networks_have_this_kernel() -> None:
    """Inputs of each pair lie in a plane of their own, at right angles to all others."""
    cosines, pairs, width, draws = torch.tensor([0.6, 0.75, 0.9]), 8, 1024, 90
    apart, generator = cosines.repeat_interleave(pairs).unsqueeze(1), torch.Generator().manual_seed(0)
    first, second = torch.eye(2 * len(apart)).chunk(2)
    inputs = torch.cat([first, apart * first + (1 - apart**2).sqrt() * second])
    means = torch.zeros(3, 3)
    for _ in range(draws):
        features = inputs
        for depth in range(3):
            fan_in = features.shape[1]
            features = (features @ torch.randn(fan_in, width, generator=generator) * math.sqrt(2 / fan_in)).relu()
            unit = features / features.norm(dim=1, keepdim=True)
            means[depth] += (unit[: len(apart)] * unit[len(apart) :]).sum(1).view(3, pairs).mean(1) / draws
    for depth in range(3):
        torch.testing.assert_close(means[depth], arc_cosine(cosines, depth + 1), rtol=0, atol=2e-3)


# The kernel of vectors


@DEPTHS
@pytest.mark.parametrize("normalize", [True, False])
def test_kernel_against_the_loop(normalize: bool, depth: int) -> None:
    x, y = random(3, 5, 4).requires_grad_(), random(4, 3, 4).requires_grad_()
    kernel = oracles.arc_cosine_of_pair(depth, normalize)
    wanted, weights = torch.stack([torch.stack([kernel(p, q) for q in y]) for p in x]), random(5, 5, 3)
    found = arc_cosine_kernel(x, y, depth, normalize)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for leaf in (x, y):
        mine, other = (torch.autograd.grad((v * weights).sum(), leaf, retain_graph=True)[0] for v in (found, wanted))
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@DEPTHS
def test_of_a_set_with_itself_it_is_symmetric_and_positive_semidefinite(depth: int) -> None:
    x = torch.cat([random(6, 30, 3), torch.zeros(2, 3), random(6, 2, 3), -random(6, 2, 3)])
    for normalize in (True, False):
        kernel = arc_cosine_kernel(x, depth=depth, normalize=normalize)
        torch.testing.assert_close(kernel, kernel.mT, rtol=0, atol=1e-12)
        assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-7
        lengths = x.norm(dim=1)
        torch.testing.assert_close(kernel.diagonal(), (lengths > 0).double() if normalize else lengths**2, rtol=1e-7, atol=0)


def test_a_row_of_zeros_is_similar_to_nothing_and_gets_no_gradient() -> None:
    for normalize in (True, False):
        x, y = torch.zeros(3, 2), torch.ones(2, 2)
        x[1] = torch.tensor([2.0, -1.0])
        x.requires_grad_()
        for other in (x, y):
            kernel = arc_cosine_kernel(x, None if other is x else y, depth=2, normalize=normalize)
            assert not kernel[[0, 2]].any()
            assert bool((kernel[1] > 0).any())
            (gradient,) = torch.autograd.grad(kernel.sum(), x)
            assert bool(torch.isfinite(gradient).all())


def test_equal_and_opposite_rows_have_a_finite_gradient() -> None:
    """Of equal ones, what the closed form gives: similarity is largest there, so that it does not move."""
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [0.1, 0.2]]).requires_grad_()
    y = x.detach().clone()
    for depth in (1, 3):
        (gradient,) = torch.autograd.grad(arc_cosine_kernel(x, y, depth).diagonal().sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros(3, 2), rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(arc_cosine_kernel(x, -y, depth).diagonal().sum(), x)
        torch.testing.assert_close(gradient, torch.zeros(3, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_do_not_count(size: float) -> None:
    x, y = random(7, 4, 5).float(), random(8, 3, 5).float()
    torch.testing.assert_close(arc_cosine_kernel(size * x, y / size), arc_cosine_kernel(x, y), rtol=1e-5, atol=1e-6)
