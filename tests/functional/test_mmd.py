"""The maximum mean discrepancy: against loops over pairs, block by block, by its invariances, and by random features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import (
    arc_cosine_kernel,
    draw_frequencies,
    gaussian_kernel,
    median_distance,
    random_feature_mmd,
    squared_mmd,
)
from lightning_netsim.functional import mmd as room
from tests import oracles
from tests.functional.common import check, random

MIXTURE = (0.5, 1.0, 3.0)
KERNELS: dict[str, tuple[Callable[..., Tensor], oracles.PairKernel]] = {
    "gaussian": (gaussian_kernel, oracles.gaussian([1.0])),
    "mixture": (partial(gaussian_kernel, bandwidths=MIXTURE), oracles.gaussian(MIXTURE)),
    "arc-cosine": (partial(arc_cosine_kernel, depth=2), oracles.arc_cosine_of_pair(2)),
    "with lengths": (partial(arc_cosine_kernel, normalize=False), oracles.arc_cosine_of_pair(1, normalize=False)),
}
EACH_KERNEL = pytest.mark.parametrize("name", KERNELS)
EACH_FORM = pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])


def dense(x: Tensor, y: Tensor, bandwidths: tuple[float, ...], unbiased: bool = False) -> Tensor:
    """Return what the loop gives, in float64, from differences of all pairs at once: for sets too large for the loop."""
    x, y = x.double(), y.double()

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        squares = (p.unsqueeze(1) - q).square().sum(2)
        return torch.stack([torch.exp(-squares / (2 * s**2)) for s in bandwidths]).mean(0)

    own = [kernel(some, some).sum() - (len(some) if unbiased else 0) for some in (x, y)]
    sizes = [len(some) * (len(some) - (1 if unbiased else 0)) for some in (x, y)]
    return own[0] / sizes[0] + own[1] / sizes[1] - 2 * kernel(x, y).mean()


# Exact


@EACH_FORM
@EACH_KERNEL
@pytest.mark.parametrize("sizes", [(6, 6), (2, 7)])
def test_against_the_loop(sizes: tuple[int, int], name: str, unbiased: bool) -> None:
    x, y = random(0, sizes[0], 3).requires_grad_(), (random(1, sizes[1], 3) + 0.5).requires_grad_()
    kernel, slow = KERNELS[name]
    wanted = oracles.squared_mmd(x, y, slow, unbiased)
    check(squared_mmd(x, y, kernel, unbiased), wanted, x, y)
    # Either side alone gets the same gradient as both.
    check(squared_mmd(x, y.detach(), kernel, unbiased), wanted, x)
    check(squared_mmd(x.detach(), y, kernel, unbiased), wanted, y)


@EACH_FORM
@EACH_KERNEL
@pytest.mark.parametrize("rows", [1, 4, 5, 11])
def test_the_size_of_blocks_does_not_count(rows: int, name: str, unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, sizes = random(6, 11, 3).requires_grad_(), (random(7, 6, 3) + 1).requires_grad_(), []
    kernel = KERNELS[name][0]
    wanted = squared_mmd(x, y, kernel, unbiased)
    monkeypatch.setattr(room, "_BLOCK_ROWS", rows)
    found = squared_mmd(x, y, lambda a, b: sizes.append((len(a), len(b))) or kernel(a, b), unbiased)  # type: ignore[func-returns-value]
    assert max(max(size) for size in sizes) == rows
    check(found, wanted, x, y, tolerance=1e-12)


def test_a_set_on_both_sides_gets_both_gradients() -> None:
    x = random(10, 6, 3).requires_grad_()
    kernel = oracles.gaussian([1.0])
    check(squared_mmd(x[:4], x[1:]), oracles.squared_mmd(x[:4], x[1:], kernel), x)


@EACH_KERNEL
def test_biased_and_equal_is_exactly_zero(name: str) -> None:
    kernel = KERNELS[name][0]
    shapes = [(size, width) for size in (1, 2, 3, 7, 64, 100) for width in (1, 3, 16, 100, 513)]
    for size, width in [*shapes, (1025, 3)]:
        for dtype in (torch.float32, torch.float64):
            x = random(size + width, size, width).to(dtype)
            elsewhere = torch.empty(x.numel() + 3, dtype=dtype)[3:].view(size, width).copy_(x)
            for other in (x, elsewhere, x.mT.contiguous().mT):
                assert float(squared_mmd(x, other, kernel)) == 0, (size, width, dtype)


def test_biased_and_equal_on_the_graph() -> None:
    for width in (2, 33):
        x = random(11, 50, width).float().requires_grad_()
        y = x.detach().clone()
        loss = squared_mmd(x, y)
        assert float(loss.detach()) == 0
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.zeros_like(x), rtol=0, atol=1e-6)


@EACH_KERNEL
def test_biased_and_nearly_equal_is_never_negative(name: str) -> None:
    for seed in range(100):
        x = random(seed, 50, 8).float()
        assert float(squared_mmd(x, x + 1e-5 * random(seed + 1000, 50, 8), KERNELS[name][0])) >= 0


@EACH_KERNEL
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 8), m=st.integers(2, 8), data=st.data())
def test_neither_the_order_of_samples_nor_of_sets_counts(name: str, seed: int, n: int, m: int, data: Any) -> None:
    x, y = random(seed, n, 3), random(seed + 1, m, 3)
    order = [data.draw(st.permutations(range(size))) for size in (n, m)]
    for unbiased in (False, True):
        value = squared_mmd(x, y, KERNELS[name][0], unbiased)
        for other in (
            squared_mmd(y, x, KERNELS[name][0], unbiased),
            squared_mmd(x[order[0]], y[order[1]], KERNELS[name][0], unbiased),
        ):
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-13)


def test_far_from_the_origin_digits_are_kept_in_float32() -> None:
    x, y = (random(12, 40, 4) + 1e4).float().requires_grad_(), (random(13, 30, 4) + 1e4 + 0.5).float().requires_grad_()
    exact = [some.detach().double().requires_grad_() for some in (x, y)]
    found, wanted = squared_mmd(x, y), dense(*exact, bandwidths=(1.0,))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(found, (x, y)), torch.autograd.grad(wanted, exact), strict=True):
        assert float((mine - other).norm()) <= 1e-5 * float(other.norm())
    kernel = gaussian_kernel(x.detach())
    torch.testing.assert_close(kernel.diagonal(), torch.ones(40), rtol=0, atol=1e-5)


def test_sets_far_from_each_other() -> None:
    """Their similarity is 0, and that within each set is not touched by the distance."""
    x, y = random(14, 40, 4).float(), (random(15, 30, 4) + 1e5).float()
    assert float(squared_mmd(x, y)) == pytest.approx(float(dense(x, y, (1.0,))), rel=1e-5)


def test_unbiased_has_the_right_expectation() -> None:
    """Of two sets of one distribution, it is 0 in the mean over draws, where the biased one is not."""
    draws = [random(seed, 12, 2) for seed in range(300)]
    for unbiased in (True, False):
        values = torch.stack([squared_mmd(*some.split((7, 5)), unbiased=unbiased) for some in draws])
        error = float(values.std()) / len(values) ** 0.5
        assert (abs(float(values.mean())) < 4 * error) == unbiased
    assert float(values.mean()) > 10 * error


# The kernel and its bandwidth


def test_gaussian_kernel_against_the_loop() -> None:
    x, y = random(22, 5, 3), random(23, 4, 3)
    for bandwidths in ((1.0,), MIXTURE):
        slow = oracles.gaussian(bandwidths)
        wanted = torch.stack([torch.stack([slow(p, q) for q in y]) for p in x])
        torch.testing.assert_close(gaussian_kernel(x, y, bandwidths), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian_kernel(x, y, 2.5), gaussian_kernel(x, y, [2.5]), rtol=0, atol=0)
    torch.testing.assert_close(gaussian_kernel(x), gaussian_kernel(x, x), rtol=0, atol=0)
    assert gaussian_kernel(x, y[:0]).shape == (5, 0)


def test_median_distance_against_the_loop() -> None:
    for sizes in ((5, 4), (8, 0), (1, 1), (3, 4)):
        x, y = random(24, sizes[0], 3), random(25, sizes[1], 3)
        pooled = torch.cat([x, y])
        lengths = sorted(float((p - q).norm()) for i, p in enumerate(pooled) for q in pooled[:i])
        assert median_distance(x, y if len(y) else None) == pytest.approx(lengths[(len(lengths) - 1) // 2], rel=1e-9)


def test_median_distance_of_equal_and_of_many_samples() -> None:
    same = torch.ones(5, 2)
    assert median_distance(same) == median_distance(same, same) == median_distance(same[:1]) == 1.0
    apart = torch.cat([torch.zeros(9, 1), torch.tensor([[2.0], [4.0]])])
    assert median_distance(apart) == pytest.approx((9 * 2 + 9 * 4 + 2) / 19)
    # What rounding leaves between equal samples far from the origin is no distance.
    base = random(24, 3, 40).float() + 1000
    pairs = median_distance(base[[0, 0, 0, 0, 0, 1]], base[[0, 0, 0]])
    assert pairs == pytest.approx(float((base[0] - base[1]).norm()), rel=1e-4)
    x, y = random(26, 900, 2), random(27, 700, 2) + 3
    every = torch.pdist(torch.cat([x, y])).median()
    assert median_distance(x, y) == pytest.approx(float(every), rel=0.05)
    assert median_distance(x.requires_grad_()) > 0


# By random features


@EACH_FORM
def test_features_against_the_loop_of_their_own_kernel(unbiased: bool) -> None:
    x, y = random(28, 6, 3).requires_grad_(), random(29, 4, 3).requires_grad_()
    frequencies = draw_frequencies(10, 3, 1.0, torch.Generator().manual_seed(0))
    wanted = oracles.squared_mmd(x, y, lambda p, q: (frequencies @ (p - q)).cos().mean(), unbiased)
    check(random_feature_mmd(x, y, frequencies, unbiased), wanted, x, y, tolerance=1e-10)


@EACH_FORM
@pytest.mark.parametrize("bandwidths", [(1.0,), MIXTURE])
def test_features_estimate_the_exact_one_in_the_mean_over_draws(bandwidths: tuple[float, ...], unbiased: bool) -> None:
    x, y, generator = random(30, 40, 3), random(31, 25, 3) + 0.4, torch.Generator().manual_seed(0)
    kernel = partial(gaussian_kernel, bandwidths=bandwidths)
    wanted = float(squared_mmd(x, y, kernel, unbiased))
    draws = torch.stack(
        [random_feature_mmd(x, y, draw_frequencies(48, 3, bandwidths, generator), unbiased) for _ in range(500)]
    )
    error = float(draws.std()) / len(draws) ** 0.5
    assert 0 < error < 0.04 * wanted
    assert abs(float(draws.mean()) - wanted) < 4 * error


def test_features_of_equal_sets_give_zero() -> None:
    for size, width in ((1, 1), (33, 5), (1000, 17)):
        x = random(32, size, width).float()
        frequencies = draw_frequencies(64, width, 1.0, torch.Generator().manual_seed(0))
        assert float(random_feature_mmd(x, x.clone(), frequencies)) == 0
        assert float(random_feature_mmd(x, x.mT.contiguous().mT, frequencies)) == 0
