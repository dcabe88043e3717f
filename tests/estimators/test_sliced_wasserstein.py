"""The sliced Wasserstein distance of image sets: against scipy, its pyramid and standardization, and draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.functional import laplacian_pyramid

FEW: dict[str, Any] = {"patches_per_image": 40, "num_directions": 64}


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape or (4, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def figures(real: Tensor, generated: Tensor, **settings: Any) -> dict[str, float]:
    metric = SlicedWassersteinDistance(**settings)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return {name: value.item() for name, value in metric.compute().items()}


def standardized(patches: Tensor) -> Tensor:
    """Return patches (n, C, P²) minus the mean of each channel, over its deviation, by a loop over channels."""
    out = torch.zeros_like(patches)
    for channel in range(patches.shape[1]):
        values = patches[:, channel]
        spread = ((values - values.mean()) ** 2).mean().sqrt()
        out[:, channel] = (values - values.mean()) / spread if float(spread) > 1e-6 else 0.0
    return out.flatten(1)


def every_patch(images: Tensor, size: int) -> Tensor:
    """Return all patches (n, C, P²) of images, by a loop over places."""
    places = [(i, j) for i in range(images.shape[2] - size + 1) for j in range(images.shape[3] - size + 1)]
    return torch.stack([image[:, i : i + size, j : j + size].flatten(1) for image in images for i, j in places]).double()


# Against scipy


def test_patches_that_cover_the_image_against_scipy() -> None:
    """With patches as large as the image, there is one place, whatever is drawn; along each direction, scipy knows."""
    real, generated = images(0, 6, 2, 5, 5), images(1, 6, 2, 5, 5) ** 2
    metric = SlicedWassersteinDistance(patch_size=5, patches_per_image=1, num_directions=20, seed=3)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    x, y = (standardized(every_patch(some, 5)) for some in (real, generated))
    normal = torch.randn(20, 50, generator=torch.Generator().manual_seed(3)).double()
    directions = normal / normal.norm(dim=1, keepdim=True)
    each = [wasserstein_distance((x @ direction).numpy(), (y @ direction).numpy()) for direction in directions]
    found = metric.compute()
    assert list(found) == ["swd", "swd_5"]
    assert float(found["swd"]) == float(found["swd_5"]) == pytest.approx(sum(each) / 20, rel=1e-4)


def test_over_the_draws_it_comes_near_that_of_all_patches() -> None:
    """Of every level of the pyramid."""
    real, generated = images(2, 3, 3, 36, 36), images(3, 3, 3, 36, 36) ** 4
    generated = F.avg_pool2d(F.pad(generated, (2, 2, 2, 2), mode="circular"), 5, stride=1)
    found = figures(real, generated, patch_size=3, patches_per_image=700, num_directions=100)
    assert sorted(found) == ["swd", "swd_18", "swd_36"]
    generator = torch.Generator().manual_seed(8)
    for first, second in zip(laplacian_pyramid(real, 2), laplacian_pyramid(generated, 2), strict=True):
        x, y = (standardized(every_patch(some, 3)) for some in (first, second))
        directions = torch.randn(100, 27, generator=generator).double()
        directions = directions / directions.norm(dim=1, keepdim=True)
        each = [
            wasserstein_distance(a, b) for a, b in zip((directions @ x.mT).numpy(), (directions @ y.mT).numpy(), strict=True)
        ]
        assert found[f"swd_{first.shape[2]}"] == pytest.approx(sum(each) / len(each), rel=0.15)
    assert found["swd"] == pytest.approx((found["swd_36"] + found["swd_18"]) / 2, rel=1e-6)
    assert found["swd_36"] > 0.05


@pytest.mark.parametrize(("size", "levels"), [(16, [16]), (31, [31]), (32, [32, 16]), (64, [64, 32, 16]), (7, [7])])
def test_levels_go_down_to_sixteen_pixels(size: int, levels: list[int]) -> None:
    wanted = ["swd", *(f"swd_{level}" for level in levels)]
    assert list(figures(images(4, 1, 1, size, size), images(5, 1, 1, size, size), **FEW)) == wanted
    assert list(figures(images(4, 1, 1, 80, size), images(5, 1, 1, 80, size), **FEW, num_levels=len(levels)))[1] == "swd_80"


# Invariances


def test_equal_sets_are_at_zero_distance_though_patches_are_drawn() -> None:
    """Both sets draw one after the other: places differ, so that it is small and not 0, and falls with their number."""
    real = images(8, 8, 3, 32, 32)
    whole = figures(real[:, :, :7, :7], real[:, :, :7, :7], num_directions=32)
    assert set(whole.values()) == {0.0}  # One place.
    few, many = (figures(real, real, patches_per_image=number, num_directions=64)["swd"] for number in (16, 256))
    assert many < 0.4 * few
    assert many < 0.06


def test_brightness_and_contrast_of_each_channel_do_not_count() -> None:
    real, generated = images(11), images(12) ** 3
    scale, shift = torch.tensor([3.0, 0.2, 100.0]).view(3, 1, 1), torch.tensor([1.0, -4.0, 0.0]).view(3, 1, 1)
    wanted = figures(real, generated, **FEW)
    assert figures(real * scale + shift, generated, **FEW) == pytest.approx(wanted, rel=1e-3)
    assert figures(real, generated * scale + shift, **FEW) == pytest.approx(wanted, rel=1e-3)
    halves = (generated * scale + shift).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert figures(real, halves, **FEW) == pytest.approx(wanted, rel=1e-2)


def test_constant_images_and_channels() -> None:
    flat = torch.full((4, 3, 32, 32), 0.3)
    assert set(figures(flat, flat + 0.2, **FEW).values()) == {0.0}
    against = figures(images(13), flat, **FEW)
    assert 0.5 < against["swd"] < 1  # The mean of |normal numbers|, about 0.8.
    one = images(14)
    one[:, 1] = 0.7
    found = figures(one, images(15), **FEW)
    assert all(0 < value < 1 for value in found.values())
    other = one.clone()
    other[:, 1] = 0.2
    assert figures(one, other, **FEW) == pytest.approx(figures(one, one, **FEW), rel=1e-5)


def test_a_call_as_a_function_is_refused_and_nothing_is_lost() -> None:
    metric = SlicedWassersteinDistance(**FEW)
    metric.update(images(1), real=True)
    with pytest.raises(NetsimError, match=r"Call `update\(images, real=\.\.\.\)`"):
        metric(images(1), real=False)
    metric.update(images(2), real=False)
    assert metric.compute()["swd"] > 0


# Sets


def test_of_unequal_numbers_as_many_are_drawn() -> None:
    """From the larger set, without replacement, which on sets without a choice of places is known."""
    real, generated = images(20, 60, 1, 7, 7), images(21, 6, 1, 7, 7)
    settings: dict[str, Any] = {"patches_per_image": 1, "num_directions": 256}
    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(256, 49, generator=generator)
    directions = (directions / directions.norm(dim=1, keepdim=True)).double()
    x, y = (standardized(every_patch(some, 7)) for some in (real, generated))
    each = []
    for _ in range(200):
        some = x[torch.randperm(60, generator=generator)[:6]]
        each.append(((directions @ some.mT).sort(1).values - (directions @ y.mT).sort(1).values).abs().mean())
    found = torch.stack(each)
    for first, second in ((real, generated), (generated, real)):
        many = figures(first, second, num_draws=200, seed=4, **settings)["swd"]
        assert many == pytest.approx(float(found.mean()), abs=4 * float(found.std()) * (2 / 200) ** 0.5)
        one = figures(first, second, seed=4, **settings)["swd"]
        assert abs(one - many) < 4 * float(found.std())
        assert one != many


def test_draws_follow_the_seed_and_begin_anew_after_a_reset() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    real, generated = images(22), images(23)
    first = figures(real, generated, seed=1, **FEW)
    assert figures(real, generated, seed=1, **FEW) == first
    assert figures(real, generated, seed=2, **FEW) != first
    metric = SlicedWassersteinDistance(seed=1, **FEW)
    for _ in range(2):
        metric.update(real, real=True)
        metric.update(generated, real=False)
        assert {name: value.item() for name, value in metric.compute().items()} == first
        assert {name: value.item() for name, value in metric.compute().items()} == first
        metric.reset()
    metric.update(images(24, 2, 1, 16, 20), real=True)  # Of another size than before the reset.
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the run are its own"


# Bad input


def test_before_both_sets_are_there() -> None:
    metric = SlicedWassersteinDistance(**FEW)
    metric.update(images(32), real=False)
    with pytest.raises(NetsimError, match="Expected `update` to be called with images of both sets, also with `real=True`"):
        metric.compute()


def test_bad_input_is_named() -> None:
    metric = SlicedWassersteinDistance(**FEW)
    for wrong, message in (
        (images(34)[0], r"`images` to be a floating-point tensor of shape \(B, C, H, W\), but got shape \(3, 32, 32\)"),
        (images(34) / 0, "`images` to be finite, but got .* non-finite of 12288 entries"),
        (images(34)[..., :6], r"`images` to be large enough for patches of 7 pixels, but got shape \(4, 3, 32, 6\)"),
    ):
        with pytest.raises(NetsimError, match="Expected " + message):
            metric.update(wrong, real=True)
    with pytest.raises(NetsimError, match=r"Expected `images` to be large enough for patches of 7 pixels, .* with 4 levels"):
        SlicedWassersteinDistance(num_levels=4).update(images(34), real=True)
    metric.update(images(34), real=True)
    for other in (images(35, 2, 3, 32, 30), images(35, 2, 1, 32, 32)):
        with pytest.raises(NetsimError, match=r"Expected `images` to be of shape \(B, 3, 32, 32\), as those before, but got"):
            metric.update(other, real=False)
    metric.update(images(35), real=False)
    assert 0 < float(metric.compute()["swd"]) < 0.5, "what was refused has left nothing behind"
    for name in ("num_levels", "patch_size", "patches_per_image", "num_directions", "num_draws", "seed"):
        with pytest.raises(NetsimError, match=f"Expected `{name}` to be"):
            SlicedWassersteinDistance(**{name: -1})
