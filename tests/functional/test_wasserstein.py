"""The sliced Wasserstein distance against scipy along each direction, and the pyramid against a loop over pixels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_netsim.functional import laplacian_pyramid, sliced_wasserstein
from lightning_netsim.functional import wasserstein as room
from tests.functional.common import random


def units(seed: int, number: int, width: int) -> Tensor:
    normal = random(seed, number, width)
    return normal / normal.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("size", "width"), [(1, 1), (2, 3), (50, 1), (40, 7)])
def test_each_direction_is_that_of_scipy(size: int, width: int) -> None:
    x, y, directions = random(0, size, width), 2 * random(1, size, width) + 0.3, units(2, 9, width)
    each = [wasserstein_distance((x @ direction).numpy(), (y @ direction).numpy()) for direction in directions]
    for direction, wanted in zip(directions, each, strict=True):
        assert float(sliced_wasserstein(x, y, direction.unsqueeze(0))) == pytest.approx(wanted, rel=1e-10)
    assert float(sliced_wasserstein(x, y, directions)) == pytest.approx(sum(each) / 9, rel=1e-10)


@pytest.mark.parametrize("elements", [1, 60, 200])
def test_directions_in_blocks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, directions = random(3, 20, 4).requires_grad_(), random(4, 20, 4), units(5, 11, 4)
    wanted = sliced_wasserstein(x, y, directions)
    widths, sort = [], torch.Tensor.sort
    monkeypatch.setattr(room, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(torch.Tensor, "sort", lambda v, *more: widths.append(len(v)) or sort(v, *more))
    found = sliced_wasserstein(x, y, directions)
    monkeypatch.undo()
    assert max(widths) == max(1, elements // 20)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, x)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), scale=st.floats(1e-3, 1e3), data=st.data())
def test_properties_of_a_distance(seed: int, size: int, scale: float, data: Any) -> None:
    x, y, z, directions = (random(seed, size, 3), random(seed + 1, size, 3), random(seed + 2, size, 3), units(seed, 5, 3))
    value = sliced_wasserstein(x, y, directions)
    assert float(value) > 0
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(sliced_wasserstein(y, x, directions), value, **close)
    torch.testing.assert_close(sliced_wasserstein(scale * x, scale * y, directions), scale * value, **close)
    torch.testing.assert_close(sliced_wasserstein(x + scale, y + scale, directions), value, rtol=1e-7, atol=1e-10)
    order = data.draw(st.permutations(range(size)))
    torch.testing.assert_close(sliced_wasserstein(x[order], y, directions), value, **close)
    assert float(sliced_wasserstein(x, x[order], directions)) == pytest.approx(0, abs=1e-12)
    assert float(sliced_wasserstein(x, x.clone(), directions)) == 0
    way_round = sliced_wasserstein(x, z, directions) + sliced_wasserstein(z, y, directions)
    assert float(value) <= float(way_round) * (1 + 1e-12)


def test_gradcheck() -> None:
    directions = units(8, 4, 3)
    sets = (random(9, 6, 3).requires_grad_(), random(10, 6, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: sliced_wasserstein(x, y, directions), sets)


# The pyramid


def mirror(place: int, size: int) -> int:
    """Return a place reflected into 0 ... size − 1, the border itself not repeated."""
    place = abs(place)
    return 2 * (size - 1) - place if place >= size else place


def smooth(image: Tensor, taps: list[float]) -> Tensor:
    """Filter one channel (H, W) along both sides, by loops."""
    height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            for di in range(-2, 3):
                for dj in range(-2, 3):
                    out[i, j] += taps[di + 2] * taps[dj + 2] * image[mirror(i + di, height), mirror(j + dj, width)]
    return out


def enlarge(smaller: Tensor, height: int, width: int) -> Tensor:
    spread = torch.zeros(height, width, dtype=smaller.dtype)
    spread[::2, ::2] = smaller
    return smooth(spread, [1 / 8, 4 / 8, 6 / 8, 4 / 8, 1 / 8])


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (13, 7)])
def test_levels_against_loops_over_pixels(size: tuple[int, int]) -> None:
    image = random(15, *size)
    found = laplacian_pyramid(image.view(1, 1, *size), 2)
    smaller = smooth(image, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])[::2, ::2]
    torch.testing.assert_close(found[1][0, 0], smaller, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0][0, 0], image - enlarge(smaller, *size), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [(16, 16), (17, 22)])
def test_levels_add_up_to_the_image(size: tuple[int, int]) -> None:
    image = random(16, *size)
    levels = laplacian_pyramid(image.expand(2, 3, *size), 3)
    assert [tuple(level.shape) for level in levels] == [
        (2, 3, *(math.ceil(side / 2**level) for side in size)) for level in range(3)
    ]
    whole = levels[-1][1, 2]
    for level in reversed(levels[:-1]):
        whole = level[1, 2] + enlarge(whole, *level.shape[2:])
    torch.testing.assert_close(whole, image, rtol=1e-12, atol=1e-12)


def test_of_a_constant_image_only_the_last_level_is_left() -> None:
    levels = laplacian_pyramid(torch.full((1, 2, 21, 30), 0.7, dtype=torch.float64), 3)
    for level in levels[:-1]:
        torch.testing.assert_close(level, torch.zeros_like(level), rtol=0, atol=1e-15)
    torch.testing.assert_close(levels[-1], torch.full((1, 2, 6, 8), 0.7, dtype=torch.float64), rtol=1e-12, atol=0)


def test_one_level_is_the_image() -> None:
    image = random(17, 2, 1, 3, 4)
    (level,) = laplacian_pyramid(image, 1)
    assert torch.equal(level, image)
