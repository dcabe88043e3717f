"""The random network: what wide ones compute, after pooling and before it, and where a patch has no direction."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim.functional import arc_cosine_kernel, exact_patch_mmd
from lightning_netsim.losses import RandomNetworkLoss


def photographs(seed: int, *shape: int) -> Tensor:
    """Return images within [0, 1] in which neighboring pixels are alike."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, stride=1) * 2).sigmoid()


def draws(criterion: RandomNetworkLoss, input: Tensor, target: Tensor, number: int) -> tuple[float, float]:
    """Return the mean of the loss over draws, and its standard error."""
    values = torch.stack([criterion(input, target) for _ in range(number)])
    assert len(values.unique()) == number
    return float(values.mean()), float(values.std()) / number**0.5


CASES = pytest.mark.parametrize(
    ("depth", "normalize", "remove_mean"),
    [(1, True, False), (3, True, False), (2, False, False), (1, True, True), (2, False, True)],
)


@CASES
def test_after_pooling_it_is_the_mmd_of_patches_under_the_arc_cosine_kernel(
    depth: int, normalize: bool, remove_mean: bool
) -> None:
    first, second = photographs(0, 1, 3, 13, 14), photographs(1, 1, 3, 13, 14) ** 3
    kernel = partial(arc_cosine_kernel, depth=depth, normalize=normalize)
    wanted = float(exact_patch_mmd(2 * first - 1, 2 * second - 1, kernel, 3, 6, 4, remove_mean))
    criterion = RandomNetworkLoss(depth, 512, window=6, stride=4, normalize=normalize, remove_mean=remove_mean)
    mean, error = draws(criterion, first.float(), second.float(), 40)
    assert 0 < error < 0.04 * wanted
    # Beside the spread of the draws, a network of width n is off by a share of the order of 1/n.
    assert abs(mean - wanted) < 4 * error + 0.01 * wanted


@CASES
def test_before_pooling_it_is_a_distance_of_patches_at_the_same_place(depth: int, normalize: bool, remove_mean: bool) -> None:
    """‖φ(p)‖² + ‖φ(q)‖² − 2 k(p, q), which is 2 − 2k for features of length 1."""
    first, second = photographs(2, 1, 3, 12, 11), photographs(3, 1, 3, 12, 11) ** 3
    p, q = ((F.unfold(2 * images - 1, 3)[0].mT.reshape(-1, 3, 9)) for images in (first, second))
    if remove_mean:
        p, q = (patches - patches.mean(2, keepdim=True) for patches in (p, q))
    kernels = [
        arc_cosine_kernel(one.flatten(1), other.flatten(1), depth, normalize).diagonal()
        for one, other in ((p, p), (q, q), (p, q))
    ]
    wanted = float((kernels[0] + kernels[1] - 2 * kernels[2]).mean())
    criterion = RandomNetworkLoss(depth, 512, pooling=False, normalize=normalize, remove_mean=remove_mean)
    mean, error = draws(criterion, first.float(), second.float(), 40)
    assert 0 < error < 0.04 * wanted
    assert abs(mean - wanted) < 4 * error + 0.01 * wanted


def test_what_a_network_computes_by_plain_layers() -> None:
    """With the weights that it draws, by matrix products over patches, position by position."""
    input, target = (photographs(seed, 2, 3, 11, 10).requires_grad_() for seed in (6, 7))
    for pooling in (True, False):
        for normalize in (True, False):
            criterion = RandomNetworkLoss(3, 12, pooling=pooling, window=5, stride=3, normalize=normalize).eval()
            layers = [layer.double().flatten(1) for layer in criterion.draw(3)]
            assert [tuple(layer.shape) for layer in layers] == [(12, 27), (12, 12), (12, 12)]
            sides = []
            for images in (input, target):
                features = F.unfold(2 * images - 1, 3)
                for layer in layers:
                    features = (layer @ features).relu()
                length = (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
                features = features / length if normalize else features * math.sqrt(27 / 12)
                maps = features.unflatten(2, (9, 8))
                sides.append(F.avg_pool2d(maps, 5, 3, ceil_mode=True) if pooling else maps)
            wanted = (sides[0] - sides[1]).square().sum(1).mean()
            found = criterion(input, target)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
            for leaf in (input, target):
                mine, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (found, wanted))
                assert float((mine - other).norm()) <= 1e-10 * float(other.norm())


def test_weights_are_of_he_initialization() -> None:
    layers = RandomNetworkLoss(3, 300, patch_size=5).draw(4)
    assert [tuple(layer.shape) for layer in layers] == [(300, 4, 5, 5), (300, 300, 1, 1), (300, 300, 1, 1)]
    for layer, inputs in zip(layers, (100, 300, 300), strict=True):
        assert float(layer.var()) == pytest.approx(2 / inputs, rel=0.03)
        assert float(layer.mean()) == pytest.approx(0, abs=4 * math.sqrt(2 / inputs / layer.numel()))
    assert not torch.equal(layers[1], layers[2])
    means = RandomNetworkLoss(2, 20, remove_mean=True).draw(3)[0].mean((2, 3))
    torch.testing.assert_close(means, torch.zeros(20, 3), rtol=0, atol=1e-6)


def test_length_of_patches_counts_where_it_is_not_divided_by() -> None:
    dim, bright = torch.full((1, 3, 9, 9), 0.6), torch.full((1, 3, 9, 9), 1.0)  # In [−1, 1]: 0.2 and 1.
    arguments: dict[str, Any] = {"depth": 2, "width": 32, "window": 4, "stride": 4}
    assert float(RandomNetworkLoss(**arguments)(dim, bright)) == pytest.approx(0, abs=1e-6)
    criterion = RandomNetworkLoss(normalize=False, **arguments | {"width": 512})
    mean, error = draws(criterion, dim, bright, 40)
    assert abs(mean - 27 * 0.8**2) < 4 * error


def test_without_means_neither_brightness_nor_color_counts() -> None:
    image = photographs(8, 1, 3, 14, 14) / 2
    tinted = image + torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64).view(3, 1, 1)
    for pooling in (True, False):
        arguments: dict[str, Any] = {"width": 32, "pooling": pooling, "window": 6, "stride": 3}
        assert float(RandomNetworkLoss(**arguments)(image, tinted)) > 1e-3
        assert float(RandomNetworkLoss(remove_mean=True, **arguments)(image, tinted)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_constant_image_nothing_is_left_without_means(dtype: torch.dtype) -> None:
    """Its features are zero, though rounding may leave something of its patches, and its gradient is finite."""
    for level in (0.0, 0.3, 1.0):
        x, other = (
            torch.full((1, 3, 12, 12), level, dtype=dtype, requires_grad=True),
            torch.full((1, 3, 12, 12), 0.77, dtype=dtype),
        )
        for pooling in (True, False):
            arguments: dict[str, Any] = {"width": 64, "pooling": pooling, "window": 6, "stride": 3, "remove_mean": True}
            loss = RandomNetworkLoss(**arguments)(x, other)
            assert 0 <= float(loss.detach()) < 1e-3
            assert bool(torch.isfinite(torch.autograd.grad(loss, x)[0]).all())
            # Against an image with patches, all of whose features have length 1, it is one everywhere before pooling.
            far = float(RandomNetworkLoss(**arguments)(x, photographs(9, 1, 3, 12, 12).to(dtype)).detach())
            assert (far == pytest.approx(1, abs=1e-2)) if not pooling else far > 0.1


def test_before_pooling_windows_do_not_count() -> None:
    input, target = photographs(13, 1, 3, 6, 6), photographs(14, 1, 3, 6, 6)
    found = RandomNetworkLoss(width=16, pooling=False)(input, target)
    assert float(found) == float(RandomNetworkLoss(width=16, pooling=False, window=2, stride=2)(input, target)) > 0
