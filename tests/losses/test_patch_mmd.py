"""Patch MMD and MMD++ as modules: bandwidths for images in [−1, 1], the local term, the means that are left out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim.functional import draw_frequencies, exact_patch_mmd, gaussian_kernel
from lightning_netsim.losses import PatchMMDLoss
from tests import oracles


def photographs(seed: int, *shape: int) -> Tensor:
    """Return images within [0, 1] in which neighboring pixels are alike."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, stride=1) * 1.5).sigmoid()


WINDOWS: dict[str, Any] = {"window": 7, "stride": 3}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("remove_mean", [False, True])
def test_the_first_draw_is_that_of_its_seed_for_images_scaled_to_both_sides_of_zero(remove_mean: bool, channels: int) -> None:
    input, target = (photographs(seed, 2, channels, 16, 15).requires_grad_() for seed in (0, 1))
    drawn = draw_frequencies(40, 9 * channels, 0.7, torch.Generator().manual_seed(6)).view(20, channels, 3, 3)
    if remove_mean:
        drawn = drawn - drawn.mean((2, 3), keepdim=True)
    wanted = oracles.random_patch_mmd(2 * input - 1, 2 * target - 1, drawn, 7, 3).mean()
    found = PatchMMDLoss(0.7, 40, remove_mean=remove_mean, seed=6, **WINDOWS)(input, target)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    for leaf in (input, target):
        mine, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (found, wanted))
        assert float((mine - other).norm()) <= 1e-10 * float(other.norm())


@pytest.mark.parametrize("remove_mean", [False, True])
def test_over_the_draws_it_is_the_exact_one(remove_mean: bool) -> None:
    """Within 2 % at 512 features, in the mean over 60 draws."""
    first, second = photographs(2, 1, 3, 20, 20), photographs(3, 1, 3, 20, 20) ** 2
    kernel = partial(gaussian_kernel, bandwidths=0.6)
    wanted = float(exact_patch_mmd(2 * first - 1, 2 * second - 1, kernel, 3, 9, 5, remove_mean))
    criterion = PatchMMDLoss(0.6, 512, window=9, stride=5, remove_mean=remove_mean)
    values = [float(criterion(first, second)) for _ in range(60)]
    assert len(set(values)) == 60
    assert sum(values) / 60 == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("patch_size", [1, 3, 4])
def test_the_local_term_by_loops_over_patches(patch_size: int) -> None:
    input, target = (photographs(seed, 2, 3, 11, 12).requires_grad_() for seed in (4, 5))
    arguments = {"num_features": 16, "patch_size": patch_size, **WINDOWS}
    sigma = 0.9 if patch_size == 3 else 0.8  # That of the paper unless told.
    bandwidth = {} if patch_size == 3 else {"local_bandwidth": sigma}
    whole = PatchMMDLoss(local_weight=0.3, **bandwidth, **arguments)(input, target)
    local = whole - PatchMMDLoss(**arguments)(input, target)
    terms = []
    for one, other in zip(2 * input - 1, 2 * target - 1, strict=True):
        p, q = (torch.cat(oracles.windows_of_patches(image, patch_size, 1, 1)) for image in (one, other))
        terms.append(torch.stack([1 - torch.exp(-(p[i] - q[i]).square().sum() / (2 * sigma**2)) for i in range(len(p))]).mean())
    wanted = 0.3 * torch.stack(terms).mean()
    torch.testing.assert_close(local, wanted, rtol=1e-9, atol=0)
    for leaf in (input, target):
        mine, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (local, wanted))
        assert float((mine - other).norm()) <= 1e-9 * float(other.norm())


def test_what_a_shift_within_the_window_and_the_mean_of_patches_are_worth() -> None:
    """On periodic stripes: a shift changes the pixels by much and the patches of a window by little."""
    places = torch.arange(40, dtype=torch.float64)
    stripes = (0.5 + 0.4 * torch.sin(2 * torch.pi * places / 8)).expand(1, 3, 40, 40)
    shifted, gray = stripes.roll(4, 3), torch.full_like(stripes, 0.5)
    mean, plus = PatchMMDLoss(window=32, stride=2), PatchMMDLoss(window=32, stride=2, remove_mean=True, local_weight=0.025)
    assert float((stripes - shifted).square().mean()) > 2 * float((stripes - gray).square().mean())
    assert float(mean(stripes, shifted)) < 0.05 * float(mean(stripes, gray))
    assert float(plus(stripes, shifted)) < 0.5 * float(plus(stripes, gray))
    without = PatchMMDLoss(window=32, stride=2, remove_mean=True)
    assert float(without(stripes, stripes + 0.05)) == pytest.approx(0, abs=1e-15)
    assert float(mean(stripes, stripes + 0.05)) > 1e-3


@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_odd_strides_leave_no_patch_out(stride: int) -> None:
    """Each pixel of the input moves the loss."""
    x = photographs(12, 1, 1, 13, 16).requires_grad_()
    loss = PatchMMDLoss(num_features=64, window=7, stride=stride)(x, photographs(13, 1, 1, 13, 16))
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool((gradient != 0).all())
