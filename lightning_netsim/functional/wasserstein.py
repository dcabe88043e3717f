"""The sliced Wasserstein distance of two sets of samples, and the pyramid of scales in which images are compared by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_netsim._checks import check_finite, check_positive_int, check_same_size, check_tensor, expected
from lightning_netsim.functional._precision import full_precision, upcast

# The taps of the binomial filter by which the pyramid smooths, 1 4 6 4 1 over 16.
_TAPS = (1, 4, 6, 4, 1)
# Numbers that are projected and sorted at a time.
_BLOCK_ELEMENTS = 2**24


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Compute the mean over directions of the Wasserstein-1 distance of both sets, as seen along that direction.

    Along one direction, the distance of two sets of N numbers is the mean of |x_(i) − y_(i)| over both in ascending order.

    Args:
        x: samples, shape (N, K).
        y: as many samples, shape (N, K).
        directions: shape (n, K), of length 1 each.

    Returns:
        A scalar, at least 0, in the units of the samples. Differentiable.

    Raises:
        NetsimError: a set is empty, or not a finite floating-point matrix, or shapes differ.

    Source: Rabin et al., SSVM 2011; Karras et al., ICLR 2018, section 5.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> sliced_wasserstein(x, x + 2, torch.eye(2)).item()
        2.0
    """
    x, y = (upcast(check_finite(name, check_tensor(name, some, 2, like="(N, K)"))) for name, some in (("x", x), ("y", y)))
    check_tensor("directions", directions, 2, like="(n, K)")
    if not len(x) or not len(directions):
        raise expected("x" if len(directions) else "directions", "one or more rows", "none")
    for dim in (0, 1):
        check_same_size("y", y, "x", x, dim=dim)
    check_same_size("directions", directions, "x", x, dim=1)
    total = x.new_zeros(())
    with full_precision(x):
        for some in torch.split(directions.to(x), max(1, _BLOCK_ELEMENTS // len(x))):
            gaps = (some @ x.mT).sort(1).values - (some @ y.to(x).mT).sort(1).values
            total = total + gaps.abs().mean(1).sum()
    return total / len(directions)


def laplacian_pyramid(images: Tensor, num_levels: int) -> list[Tensor]:
    """Split images into bands of spatial frequency, each half the size of the one before; the last holds what is left.

    Each level but the last is an image minus its smaller version, enlarged again: their sum, enlarged level by level, is the
    image.

    Args:
        images: shape (B, C, H, W).
        num_levels: at least 1; so many halvings less one have to leave three pixels on the shorter side.

    Returns:
        The levels, the finest first: shapes (B, C, H, W), (B, C, ⌈H/2⌉, ⌈W/2⌉), and so on.

    Raises:
        NetsimError: images are not a floating-point tensor of that shape, or are too small for so many levels.

    Source: Burt and Adelson, IEEE Transactions on Communications 1983.

    Example:
        >>> [level.shape[-1] for level in laplacian_pyramid(torch.rand(1, 3, 64, 64), 3)]
        [64, 32, 16]
    """
    image = upcast(check_tensor("images", images, 4, like="(B, C, H, W)"))
    check_positive_int("num_levels", num_levels)
    levels = []
    for _ in range(num_levels - 1):
        if min(image.shape[2:]) < 5:
            wanted = f"large enough for {num_levels} levels, the shorter side of the last but one being at least 5"
            raise expected("images", wanted, f"shape {tuple(images.shape)}", "Choose fewer levels.")
        smaller = _smooth(image, 1.0)[:, :, ::2, ::2]
        spread = image.new_zeros(image.shape)
        spread[:, :, ::2, ::2] = smaller
        levels.append(image - _smooth(spread, 4.0))
        image = smaller
    return [*levels, image]


def _smooth(images: Tensor, gain: float) -> Tensor:
    """Return images smoothed by the binomial filter, reflected at the border, times `gain`."""
    taps = images.new_tensor(_TAPS) / sum(_TAPS)
    kernel = (gain * torch.outer(taps, taps)).expand(images.shape[1], 1, -1, -1)
    with full_precision(images):
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])
