"""Compare the distributions of patches in the windows of two images: what perceptual losses turn out to compute.

Both forms take the patches of P × P pixels and all channels at each position of an image, group the positions into windows,
and average over the windows the squared maximum mean discrepancy between the patches of one image and those of the other.
Images are not padded: of H × W pixels, there are (H − P + 1) × (W − P + 1) patches. Windows are those of average pooling with
``ceil_mode``: they begin at every `stride`-th patch, and those that reach over the far border are cut there, so that each patch
is in a window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_netsim._checks import check_choice, check_positive_int, check_tensor, expected
from lightning_netsim.functional._once import forbid_second_derivative
from lightning_netsim.functional._precision import full_precision, upcast
from lightning_netsim.functional.mmd import Kernel, squared_mmd

# Angles that are in work at a time on a CPU: with their cosines and sines they stay in the cache. A GPU wants large blocks.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**18, 2**24
# Frequencies in a block, at least: fewer make slow products.
_LEAST_FREQUENCIES = 16


def check_pair(input: object, target: object) -> tuple[Tensor, Tensor]:
    """Return two batches of images in float32 or better if they can be compared: one image is with each of the other batch."""
    images = []
    for name, value in (("input", input), ("target", target)):
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            raise expected(name, "floating-point images", "dtype torch.uint8", "Divide: `images.float() / 255`.")
        if isinstance(value, Tensor) and value.ndim == 3:
            got = f"shape {tuple(value.shape)}"
            raise expected(name, "images of shape (B, C, H, W)", got, "Of a single image: `image.unsqueeze(0)`.")
        image = check_tensor(name, value, 4, like="(B, C, H, W)")
        if not image.numel():
            raise expected(name, "one or more images", f"shape {tuple(image.shape)}")
        images.append(upcast(image).contiguous())  # Products of other strides round otherwise, and equal images would differ.
    first, second = images
    if first.shape[1:] != second.shape[1:] or (
        first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0])
    ):
        wanted = f"of the shape of `target`, {tuple(second.shape)}, or one image of that size"
        raise expected("input", wanted, f"shape {tuple(first.shape)}", "Resize or crop one of them.")
    return first, second


def each_pair(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs that two batches make, each a pair of batches of one."""
    size = max(len(first), len(second))
    return list(zip(*(torch.split(some.expand(size, *some.shape[1:]), 1) for some in (first, second)), strict=True))


def check_windows(size: tuple[int, int] | None, patch_size: int, window: int, stride: int, remove_mean: bool = False) -> None:
    """Raise unless windows leave no patch out, and images of `size` (H, W), where that is known, have whole windows."""
    for name, value in (("patch_size", patch_size), ("window", window), ("stride", stride)):
        check_positive_int(name, value)
    if remove_mean and patch_size == 1:
        raise expected("patch_size", "at least 2 with `remove_mean`", "1", "Of a single pixel, nothing would be left.")
    if stride > window:
        remedy = "Between windows further apart than they are wide, patches would not be compared."
        raise expected("stride", f"at most `window` ({window})", str(stride), remedy)
    if size is not None and min(size) < patch_size:
        raise expected("patch_size", f"at most the shorter side of images of {size[0]}×{size[1]}", str(patch_size))
    if size is not None and min(size) - patch_size + 1 < window:
        wanted = f"at most {min(size) - patch_size + 1}, the patches along the shorter side of images of {size[0]}×{size[1]}"
        raise expected("window", wanted, str(window), "Choose a smaller window, or larger images.")


def pool_windows(maps: Tensor, window: int, stride: int) -> Tensor:
    """Average maps over windows, as ``avg_pool2d(maps, window, stride, ceil_mode=True)``, by two matrix products.

    Args:
        maps: shape (..., H, W).
        window: its height and width, at least 1 and at most H and W.
        stride: between windows, at least 1 and at most `window`.

    Returns:
        Shape (..., n, m), with n = ⌈(H − window)/stride⌉ + 1 windows down and as many across.

    Raises:
        NetsimError: for a window larger than the maps, or a stride larger than the window.

    Example:
        >>> pool_windows(torch.arange(5.0).expand(5, 5), 2, 2)[0]
        tensor([0.5000, 2.5000, 4.0000])
    """
    check_windows((maps.shape[-2], maps.shape[-1]), 1, window, stride)
    rows, columns = (_window_means(size, window, stride).to(maps) for size in maps.shape[-2:])
    return rows @ (maps @ columns.mT)


def _window_means(size: int, window: int, stride: int) -> Tensor:
    """Return the matrix that averages `size` values over windows, shape (n, size), float64."""
    begins = torch.arange(math.ceil((size - window) / stride) + 1).unsqueeze(1) * stride
    places = torch.arange(size)
    inside = ((places >= begins) & (places < begins + window)).double()
    return inside / inside.sum(1, keepdim=True)


def remove_patch_means(filters: Tensor) -> Tensor:
    """Return filters that see each patch without its mean in each channel: their own channel means are taken off.

    ⟨w, p − mean p⟩ = ⟨w − mean w, p⟩, as both leave out the same direction of each channel.
    """
    return filters - filters.mean((-2, -1), keepdim=True)


def random_patch_mmd(
    input: Tensor, target: Tensor, frequencies: Tensor, window: int = 32, stride: int = 16, reduction: str = "mean"
) -> Tensor:
    """Estimate the squared maximum mean discrepancy of the patches in each window, by random Fourier features.

    With a = w * image the angles at each position of an image, it is the mean over windows and over the frequencies w of
    (mean cos a − mean cos a')² + (mean sin a − mean sin a')², where means are over the patches of a window: that of the
    Gaussian kernel that the frequencies were drawn for, see `draw_frequencies`.

    Features come in blocks that stay in the cache, and the gradient is found on the way: memory is that of the images, of the
    patches of one image, P² as large as it is, and of one block. Angles are formed in the dtype of the images, in float32 or
    better; in bfloat16 they would be off by whole turns.

    Args:
        input: images, shape (B, C, H, W), in the units that the bandwidth has.
        target: as many images, or either of them a single one, which is compared with each of the other.
        frequencies: shape (r/2, C, P, P).
        window: patches in a window, in height and width.
        stride: patches between windows.
        reduction: "mean" over the images, or "none".

    Returns:
        A scalar, or shape (B,): at least 0, and exactly 0 for equal images. Differentiable once, with respect to both.

    Raises:
        NetsimError: images of different sizes, a window larger than the images, a stride larger than the window.

    Source: Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021; features of Rahimi and Recht in their
    form without phases (Sutherland and Schneider, UAI 2015): of as many features, the estimate varies about as much, and takes
    half the convolutions.

    Example:
        >>> from lightning_netsim.functional import draw_frequencies
        >>> images, generator = torch.rand(2, 3, 40, 40), torch.Generator().manual_seed(0)
        >>> frequencies = draw_frequencies(64, 27, 0.6, generator).view(32, 3, 3, 3)
        >>> random_patch_mmd(images, images, frequencies)
        tensor(0.)
        >>> bool(random_patch_mmd(images + 0.4, images, frequencies) > random_patch_mmd(images + 0.2, images, frequencies))
        True
    """
    input, target = check_pair(input, target)
    frequencies = check_tensor("frequencies", frequencies, 4, like="(r/2, C, P, P)")
    number, channels, size, width = frequencies.shape
    if not number or channels != input.shape[1] or size != width:
        wanted = f"one or more square filters of {input.shape[1]} channels, as the images have"
        raise expected("frequencies", wanted, f"shape {tuple(frequencies.shape)}")
    check_windows((input.shape[2], input.shape[3]), size, window, stride)
    check_choice("reduction", reduction, ("mean", "none"))
    target, frequencies = target.to(input), frequencies.to(input)
    # Gradients are of the mean over images: where each is asked for, each is a mean of one.
    pairs = [(input, target)] if reduction == "mean" else each_pair(input, target)
    with full_precision(input):
        means = [_WindowMMD.apply(*pair, frequencies, window, stride) for pair in pairs]
    return means[0] if reduction == "mean" else torch.stack(means)


def exact_patch_mmd(
    input: Tensor,
    target: Tensor,
    kernel: Kernel,
    patch_size: int = 3,
    window: int = 32,
    stride: int = 16,
    remove_mean: bool = False,
) -> Tensor:
    """Compute the squared maximum mean discrepancy of the patches in each window exactly, by all pairs of patches.

    It takes window⁴ similarities for each window, some ten thousand times the work of `random_patch_mmd`: for small images, for
    other kernels, and to hold estimates to.

    Args:
        input: images, shape (B, C, H, W).
        target: as many images, or either of them a single one, which is compared with each of the other.
        kernel: symmetric function of patches (N, C·P·P) and (M, C·P·P), see `squared_mmd`.
        patch_size: P, the height and width of a patch.
        window: patches in a window, in height and width.
        stride: patches between windows.
        remove_mean: subtract from each patch its mean in each channel.

    Returns:
        Shape (B,), the mean over the windows. Differentiable once, with respect to both.

    Raises:
        NetsimError: as `random_patch_mmd`.

    Source: Amir and Weiss, CVPR 2021, equation of the windowed MMD.

    Example:
        >>> from lightning_netsim.functional import gaussian_kernel
        >>> black, white = torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)
        >>> exact_patch_mmd(black, white, gaussian_kernel, window=4, stride=4)  # 2 − 2 exp(−9/2)
        tensor([1.9778])
    """
    input, target = check_pair(input, target)
    check_windows((input.shape[2], input.shape[3]), patch_size, window, stride, remove_mean)
    windows = [_windows_of_patches(images, patch_size, window, stride, remove_mean) for images in (input, target.to(input))]
    values = []
    for first, second in zip(*windows, strict=True):
        values.append(torch.stack([squared_mmd(x[0], y[0], kernel) for x, y in each_pair(first, second)]))
    return torch.stack(values).mean(0)


def _windows_of_patches(images: Tensor, patch_size: int, window: int, stride: int, remove_mean: bool) -> list[Tensor]:
    """Return the patches of each window, shape (B, patches, C·P·P)."""
    patches = images.unfold(2, patch_size, 1).unfold(3, patch_size, 1)  # (B, C, rows, columns, P, P)
    if remove_mean:
        patches = patches - patches.mean((-2, -1), keepdim=True)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
    starts = [range(0, math.ceil((size - window) / stride) * stride + 1, stride) for size in patches.shape[1:3]]
    return [patches[:, row : row + window, column : column + window].flatten(1, 2) for row in starts[0] for column in starts[1]]


class _WindowMMD(torch.autograd.Function):
    """`random_patch_mmd`, averaged over the images; the gradient is found on the way."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, frequencies: Tensor, window: int, stride: int) -> Tensor:
        angles = _Angles(frequencies, (input.shape[2], input.shape[3]), window, stride)
        gradients: list[Tensor | None] = [None, None]
        # Means of the side that is fixed come first; where both are wanted, the target is gone over twice.
        target_means = angles.means(target)
        if ctx.needs_input_grad[0]:
            input_means, gradients[0] = angles.means_and_gradient(input, target_means)
        else:
            input_means = angles.means(input)
        if ctx.needs_input_grad[1]:
            gradients[1] = angles.means_and_gradient(target, input_means)[1]
        ctx.save_for_backward(input, target, *gradients)
        gaps = input_means - target_means
        return gaps.square().mean((0, 3, 4)).sum(0).mean()  # Cosines and sines add up, all else is averaged.

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        *images, first, second = ctx.saved_tensors
        return (
            *(None if found is None else scale * forbid_second_derivative(found, *images) for found in (first, second)),
            None,
            None,
            None,
        )


class _Angles:
    """The angles a = w * image of frequencies w, in blocks; means of their cosines and sines over windows, and their gradients.

    Args:
        frequencies: shape (n, C, P, P).
        size: (H, W) of the images.
        window: patches in a window, in height and width.
        stride: patches between windows.
    """

    def __init__(self, frequencies: Tensor, size: tuple[int, int], window: int, stride: int) -> None:
        self.frequencies = frequencies.flatten(1)
        self.image_size, self.patch_size = size, frequencies.shape[-1]
        self.shape = [side - self.patch_size + 1 for side in size]  # Patches down and across.
        self.rows, self.columns = (_window_means(length, window, stride).to(frequencies) for length in self.shape)
        self.limit = _GPU_ELEMENTS if frequencies.is_cuda else _CPU_ELEMENTS

    def means(self, images: Tensor) -> Tensor:
        """Return the means of cosines and sines in each window, shape (B, 2, n, rows, columns)."""
        return torch.cat([self._sweep(some, None)[0] for some in self._groups(images)])

    def means_and_gradient(self, images: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return these means, and the gradient of the mean squared distance from the `other` means, shape of the images."""
        if len(images) == 1:  # Several others pull as their mean does.
            other = other.mean(0, keepdim=True)
        groups = self._groups(images)
        others = torch.split(other.expand(len(images), *other.shape[1:]), [len(some) for some in groups])
        means, gradients = zip(*(self._sweep(some, fixed) for some, fixed in zip(groups, others, strict=True)), strict=True)
        scale = 2 / (len(images) * len(self.frequencies) * len(self.rows) * len(self.columns))
        return torch.cat(means), torch.cat(gradients) * scale

    def _groups(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return images in groups: one at a time, unless several fit into a block."""
        number = min(_LEAST_FREQUENCIES, len(self.frequencies))
        return torch.split(images, max(1, self.limit // (self.shape[0] * self.shape[1] * number)))

    def _sweep(self, images: Tensor, other: Tensor | None) -> tuple[Tensor, Any]:
        """Return the means of a group of images, and half the gradient of Σ (means − other)² where there are others."""
        patches = F.unfold(images, self.patch_size)  # (B, C·P·P, positions)
        pull = None if other is None else torch.zeros_like(patches)
        number = max(_LEAST_FREQUENCIES, self.limit // (len(images) * patches.shape[-1]))
        means = images.new_empty(len(images), 2, len(self.frequencies), len(self.rows), len(self.columns))
        for start in range(0, len(self.frequencies), number):
            block = slice(start, start + number)
            frequencies = self.frequencies[block]
            angles = frequencies @ patches
            cosine, sine = angles.cos(), angles.sin_()
            for side, values in enumerate((cosine, sine)):
                means[:, side, block] = self._pool(values)
            if pull is not None and other is not None:
                gap = means[:, :, block] - other[:, :, block]
                # d cos a = −sin a da, d sin a = cos a da
                slope = cosine.mul_(self._spread(gap[:, 1])).sub_(sine.mul_(self._spread(gap[:, 0])))
                pull.baddbmm_(frequencies.mT.expand(len(images), -1, -1), slope)
        return means, None if pull is None else F.fold(pull, self.image_size, self.patch_size)

    def _pool(self, values: Tensor) -> Tensor:
        """Return the means over windows of values at all positions."""
        maps = values.view(-1, *self.shape)
        pooled = torch.bmm(self.rows.expand(len(maps), -1, -1), maps) @ self.columns.mT
        return pooled.view(*values.shape[:-1], len(self.rows), len(self.columns))

    def _spread(self, values: Tensor) -> Tensor:
        """Return values of windows, shared out to their positions: the transpose of `_pool`."""
        maps = (values @ self.columns).flatten(0, -3)
        return torch.bmm(self.rows.mT.expand(len(maps), -1, -1), maps).view(*values.shape[:-2], -1)
