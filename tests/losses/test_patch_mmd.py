"""Patch MMD and MMD++ as modules: bandwidths for images in [−1, 1], the local term, the means that are left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import instantiate_class
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim import NetsimError
from lightning_netsim.functional import draw_frequencies, exact_patch_mmd, gaussian_kernel
from lightning_netsim.losses import PatchMMDLoss
from lightning_netsim.losses import patch_mmd as room
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
    whole = PatchMMDLoss(local_weight=0.3, local_bandwidth=0.8, **arguments)(input, target)
    local = whole - PatchMMDLoss(**arguments)(input, target)
    terms = []
    for one, other in zip(2 * input - 1, 2 * target - 1, strict=True):
        p, q = (torch.cat(oracles.windows_of_patches(image, patch_size, 1, 1)) for image in (one, other))
        terms.append(torch.stack([1 - torch.exp(-(p[i] - q[i]).square().sum() / (2 * 0.8**2)) for i in range(len(p))]).mean())
    wanted = 0.3 * torch.stack(terms).mean()
    torch.testing.assert_close(local, wanted, rtol=1e-9, atol=0)
    for leaf in (input, target):
        mine, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (local, wanted))
        assert float((mine - other).norm()) <= 1e-9 * float(other.norm())


def test_the_sum_of_the_paper_is_that_of_its_two_terms() -> None:
    input, target = photographs(6, 2, 3, 16, 15), photographs(7, 2, 3, 16, 15)
    for reduction in ("mean", "none"):
        arguments = {"num_features": 32, "reduction": reduction, **WINDOWS}
        found = PatchMMDLoss(remove_mean=True, local_weight=0.025, **arguments)(input, target)
        first = PatchMMDLoss(remove_mean=True, **arguments)(input, target)
        squares = F.unfold(2 * (input - target), 3).square().sum(1)
        second = 0.025 * (1 - torch.exp(-squares / (2 * 0.9**2))).mean(1)
        torch.testing.assert_close(found, first + (second.mean() if reduction == "mean" else second), rtol=1e-12, atol=0)


def test_in_windows_of_one_patch_half_of_it_is_the_local_term() -> None:
    input, target = photographs(8, 1, 1, 12, 12), photographs(9, 1, 1, 12, 12)
    local = PatchMMDLoss(0.9, 8, window=1, stride=1, local_weight=1.0, local_bandwidth=0.9)(input, target)
    local = local - PatchMMDLoss(0.9, 8, window=1, stride=1)(input, target)
    criterion = PatchMMDLoss(0.9, 1024, window=1, stride=1)
    values = torch.stack([criterion(input, target) for _ in range(40)]) / 2
    error = float(values.std()) / 40**0.5
    assert 0 < error < 0.02 * float(local)
    assert abs(float(values.mean()) - float(local)) < 4 * error


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


def test_minimizing_it_gives_the_texture_back() -> None:
    target = photographs(10, 1, 1, 18, 18).float()
    x = torch.full_like(target, 0.5).add_(torch.randn_like(target), alpha=0.01).requires_grad_()
    criterion, held = PatchMMDLoss(num_features=64, window=8, stride=4), PatchMMDLoss(window=8, stride=4).eval()
    optimizer, before = torch.optim.Adam([x], lr=0.05), float(held(x, target).detach())
    for _ in range(60):
        optimizer.zero_grad()
        criterion(x, target).backward()
        optimizer.step()
    assert float(held(x, target).detach()) < 0.2 * before
    assert float(x.detach().std()) > 0.5 * float(target.std())


def test_its_arguments_make_it_again() -> None:
    arguments = {
        "bandwidth": 0.5,
        "num_features": 8,
        "patch_size": 2,
        "window": 5,
        "stride": 4,
        "remove_mean": True,
        "local_weight": 0.1,
        "local_bandwidth": 0.7,
        "value_range": (-1.0, 1.0),
        "redraw": False,
        "reduction": "none",
        "seed": 3,
    }
    criterion = PatchMMDLoss(**arguments)  # type: ignore[arg-type]
    config = criterion.config()
    assert config == {"class_path": f"{room.__name__}.PatchMMDLoss", "init_args": arguments}
    again = instantiate_class((), config)
    assert again.config() == config
    input, target = photographs(11, 2, 3, 9, 9), photographs(14, 2, 3, 9, 9)
    assert torch.equal(again(input, target), criterion(input, target))


IMAGE = torch.rand(1, 3, 20, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchMMDLoss(bandwidth=0.0), "Expected `bandwidth` to be a positive number, but got 0.0"),
        (lambda: PatchMMDLoss(num_features=7), "Expected `num_features` to be an even number, .* but got 7"),
        (lambda: PatchMMDLoss(patch_size=0), "Expected `patch_size` to be a positive int, but got 0"),
        (lambda: PatchMMDLoss(patch_size=1, remove_mean=True), "Expected `patch_size` to be at least 2 with `remove_mean`"),
        (lambda: PatchMMDLoss(window=8), r"Expected `stride` to be at most `window` \(8\), but got 16"),
        (lambda: PatchMMDLoss(stride=0), "Expected `stride` to be a positive int, but got 0"),
        (lambda: PatchMMDLoss(window=1.5), "Expected `window` to be a positive int, but got 1.5"),  # type: ignore[arg-type]
        (lambda: PatchMMDLoss(local_weight=-0.1), "Expected `local_weight` to be a positive number, but got -0.1"),
        (lambda: PatchMMDLoss(local_bandwidth=-1.0), "Expected `local_bandwidth` to be a positive number, but got -1.0"),
        (lambda: PatchMMDLoss()(IMAGE, IMAGE), "Expected `window` to be at most 14, .* of 20×16, but got 32. Choose a smaller"),
        (
            lambda: PatchMMDLoss(window=14, stride=5, patch_size=17)(IMAGE, IMAGE),
            "Expected `patch_size` to be at most the shorter side",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_odd_strides_leave_no_patch_out(stride: int) -> None:
    """Each pixel of the input moves the loss."""
    x = photographs(12, 1, 1, 13, 16).requires_grad_()
    loss = PatchMMDLoss(num_features=64, window=7, stride=stride)(x, photographs(13, 1, 1, 13, 16))
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool((gradient != 0).all())
