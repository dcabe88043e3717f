"""The MMD of patches in windows: against convolution and pooling by autograd, and against loops over patches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim.functional import (
    arc_cosine_kernel,
    draw_frequencies,
    exact_patch_mmd,
    gaussian_kernel,
    pool_windows,
    random_patch_mmd,
)
from lightning_netsim.functional import patch_mmd as room
from tests import oracles
from tests.functional.common import check, random


def photographs(seed: int, *shape: int) -> Tensor:
    """Return images within [−1, 1] in which neighboring pixels are alike."""
    noise = random(seed, *shape)
    return (F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="circular"), 5, stride=1) * 2.5).tanh()


def frequencies_for(images: Tensor, number: int, size: int = 3, bandwidth: float = 0.6, seed: int = 0) -> Tensor:
    drawn = draw_frequencies(2 * number, images.shape[1] * size**2, bandwidth, torch.Generator().manual_seed(seed))
    return drawn.view(number, images.shape[1], size, size)


# (H, W), channels, size of a patch, window, stride, number of frequencies
LAYOUTS: dict[str, tuple[tuple[int, int], int, int, int, int, int]] = {
    "whole windows": ((18, 18), 3, 3, 8, 4, 20),
    "odd stride, cut windows": ((17, 22), 3, 3, 6, 5, 17),
    "stride of one": ((9, 8), 1, 3, 4, 1, 3),
    "one window": ((10, 10), 4, 3, 8, 8, 40),
    "windows of one patch": ((6, 7), 3, 3, 1, 1, 5),
    "patches of one pixel": ((9, 11), 3, 1, 4, 3, 33),
    "patches of two pixels": ((9, 11), 1, 2, 5, 2, 16),
    "one frequency": ((12, 9), 4, 5, 3, 3, 1),
}
EACH_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)


def case(name: str, first: int = 3, second: int = 3) -> tuple[Tensor, Tensor, Tensor, int, int]:
    size, channels, patch, window, stride, number = LAYOUTS[name]
    input, target = random(1, first, channels, *size).requires_grad_(), random(2, second, channels, *size).requires_grad_()
    return input, target, frequencies_for(input, number, patch, 1.0), window, stride


@EACH_LAYOUT
@pytest.mark.parametrize("sizes", [(3, 3), (1, 3), (3, 1), (1, 1)])
def test_random_against_convolution_and_pooling(sizes: tuple[int, int], name: str) -> None:
    input, target, frequencies, window, stride = case(name, *sizes)
    wanted = oracles.random_patch_mmd(input, target, frequencies, window, stride)
    assert wanted.shape == (max(sizes),)
    for reduction, expected in (("none", wanted), ("mean", wanted.mean())):
        check(random_patch_mmd(input, target, frequencies, window, stride, reduction), expected, input, target)
        # Either side alone gets the same gradient as both.
        check(random_patch_mmd(input, target.detach(), frequencies, window, stride, reduction), expected, input)
        check(random_patch_mmd(input.detach(), target, frequencies, window, stride, reduction), expected, target)


def test_images_have_gradients_of_their_own_weights() -> None:
    input, target, frequencies, window, stride = case("whole windows")
    wanted, weights = oracles.random_patch_mmd(input, target, frequencies, window, stride), torch.tensor([0.0, 1.0, -3.0])
    check(random_patch_mmd(input, target, frequencies, window, stride, "none") * weights, wanted * weights, input, target)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize(("elements", "least"), [(1, 1), (1, 7), (700, 3), (1500, 4), (4000, 16), (2**18, 1)])
def test_the_size_of_blocks_does_not_count(
    elements: int, least: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    input, target, frequencies, window, stride = case("odd stride, cut windows", *sizes)
    wanted = oracles.random_patch_mmd(input, target, frequencies, window, stride).mean()
    widths, sin = [], torch.Tensor.sin_
    monkeypatch.setattr(room, "_CPU_ELEMENTS", elements)
    monkeypatch.setattr(room, "_LEAST_FREQUENCIES", least)
    monkeypatch.setattr(torch.Tensor, "sin_", lambda angles: widths.append(tuple(angles.shape[:2])) or sin(angles))
    found = random_patch_mmd(input, target, frequencies, window, stride)
    monkeypatch.undo()
    assert max(images * number for images, number in widths) <= max(least, elements // (15 * 20))
    check(found, wanted, input, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EACH_LAYOUT
def test_equal_images_give_exactly_zero(name: str, dtype: torch.dtype) -> None:
    input, _, frequencies, window, stride = case(name)
    input = input.detach().to(dtype)
    for first in (input, input.clone().requires_grad_()):
        for second in (input, input.clone(), input.to(memory_format=torch.channels_last), input.clone().requires_grad_()):
            for reduction in ("mean", "none"):
                value = random_patch_mmd(first, second, frequencies, window, stride, reduction)
                assert not value.any()
                if value.requires_grad:
                    leaf = first if first.requires_grad else second
                    assert not torch.autograd.grad(value.sum(), leaf)[0].any()
    for number in (2, 5):
        value = random_patch_mmd(input[:1], input[:1].repeat(number, 1, 1, 1), frequencies, window, stride)
        assert float(value) == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), near=st.floats(1e-7, 10), batch=st.integers(1, 3))
def test_it_is_symmetric_and_never_negative(seed: int, near: float, batch: int) -> None:
    input = random(seed, batch, 3, 9, 10).float()
    target = (input + near * random(seed + 1, batch, 3, 9, 10)).float()
    frequencies = frequencies_for(input, 9, seed=seed)
    value = random_patch_mmd(input, target, frequencies, 4, 3, "none")
    assert bool((value >= 0).all())
    assert bool((value <= 4).all())
    torch.testing.assert_close(random_patch_mmd(target, input, frequencies, 4, 3, "none"), value, rtol=1e-5, atol=1e-12)


# Exact


@EACH_LAYOUT
def test_exact_against_loops_over_patches(name: str) -> None:
    size, channels, patch, window, stride, _ = LAYOUTS[name]
    sigma = patch * math.sqrt(channels)
    kernel = partial(gaussian_kernel, bandwidths=sigma)

    def gaussian(p: Tensor, q: Tensor) -> Tensor:
        return torch.exp(-(p.unsqueeze(1) - q).square().sum(2) / (2 * sigma**2)).mean()

    for remove_mean in (False, True)[: 1 if patch == 1 else 2]:
        input, target = random(3, 2, channels, *size).requires_grad_(), random(4, 1, channels, *size).requires_grad_()
        wanted = []
        for image in input:
            sides = [windows_of_patches(some, patch, window, stride, remove_mean) for some in (image, target[0])]
            values = [gaussian(p, p) + gaussian(q, q) - 2 * gaussian(p, q) for p, q in zip(*sides, strict=True)]
            wanted.append(torch.stack(values).mean())
        found = exact_patch_mmd(input, target, kernel, patch, window, stride, remove_mean)
        check(found, torch.stack(wanted), input, target, tolerance=1e-10)


def windows_of_patches(image: Tensor, patch: int, window: int, stride: int, remove_mean: bool) -> list[Tensor]:
    windows = oracles.windows_of_patches(image, patch, window, stride)
    if not remove_mean:
        return windows
    split = [some.view(len(some), -1, patch * patch) for some in windows]
    return [(some - some.mean(2, keepdim=True)).flatten(1) for some in split]


def test_exact_of_equal_images_is_exactly_zero() -> None:
    image = random(7, 2, 3, 12, 13)
    for kernel in (gaussian_kernel, arc_cosine_kernel):
        for some in (image, image.float()):
            assert not exact_patch_mmd(some, some.clone(), kernel, 3, 6, 4).any()
            assert not exact_patch_mmd(some, some.to(memory_format=torch.channels_last), kernel, 3, 6, 4).any()


# Random against exact


@pytest.mark.parametrize("remove_mean", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_random_is_within_two_percent_of_exact(channels: int, remove_mean: bool) -> None:
    """r = 512 features, in the mean over 60 draws."""
    first, second = photographs(8, 1, channels, 26, 24), photographs(9, 1, channels, 26, 24) * 0.5 + 0.2
    wanted = float(exact_patch_mmd(first, second, partial(gaussian_kernel, bandwidths=0.6), 3, 12, 6, remove_mean))
    values = []
    for seed in range(60):
        frequencies = frequencies_for(first, 256, seed=seed)
        if remove_mean:
            frequencies = room.remove_patch_means(frequencies)
        values.append(float(random_patch_mmd(first, second, frequencies, 12, 6)))
    assert sum(values) / 60 == pytest.approx(wanted, rel=0.02)
    assert wanted > 0.01


@pytest.mark.parametrize("name", [name for name, (_, _, patch, *_) in LAYOUTS.items() if patch > 1])
def test_filters_without_means_see_patches_without_means(name: str) -> None:
    size, channels, patch, window, stride, number = LAYOUTS[name]
    input, target = random(10, 1, channels, *size), random(11, 1, channels, *size)
    frequencies = frequencies_for(input, number, patch, 1.0)
    found = random_patch_mmd(input, target, room.remove_patch_means(frequencies), window, stride)
    sides = []
    for image in (input, target):
        windows = windows_of_patches(image[0], patch, window, stride, remove_mean=True)
        angles = [some @ frequencies.flatten(1).mT for some in windows]
        sides.append(torch.stack([torch.cat([some.cos().mean(0), some.sin().mean(0)]) for some in angles]))
    wanted = (sides[0] - sides[1]).square().sum(1).mean() / number
    assert float(found) == pytest.approx(float(wanted), abs=1e-10)
    assert float(wanted) > 1e-3


def test_within_a_window_the_order_of_patches_does_not_count() -> None:
    """With patches of one pixel, an image and itself shuffled are alike in one window over all."""
    image = random(15, 1, 3, 8, 8)
    shuffled = image.flatten(2)[:, :, torch.randperm(64)].view(1, 3, 8, 8)
    frequencies = frequencies_for(image, 20, size=1)
    assert float(random_patch_mmd(image, shuffled, frequencies, 8, 8)) == pytest.approx(0, abs=1e-25)
    assert float(random_patch_mmd(image, shuffled, frequencies, 4, 4)) > 0.01


# Windows


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), data=st.data())
def test_pooling_is_average_pooling_with_cut_windows(height: int, width: int, data: Any) -> None:
    window = data.draw(st.integers(1, min(height, width)))
    stride = data.draw(st.integers(1, window))
    maps = random(height + width, 2, 3, height, width).requires_grad_()
    wanted = F.avg_pool2d(maps, window, stride, ceil_mode=True)
    found = pool_windows(maps, window, stride)
    assert found.shape == wanted.shape
    weights = random(0, *wanted.shape)
    check(found * weights, wanted * weights, maps)


def test_float32_keeps_the_digits_of_angles() -> None:
    input, target = photographs(18, 2, 3, 20, 20), photographs(19, 2, 3, 20, 20)
    frequencies = frequencies_for(input, 64, bandwidth=0.1)
    wanted = oracles.random_patch_mmd(input, target, frequencies, 8, 4).mean()
    assert float(random_patch_mmd(input.float(), target.float(), frequencies, 8, 4)) == pytest.approx(float(wanted), rel=1e-4)
