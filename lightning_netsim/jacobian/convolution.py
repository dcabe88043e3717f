"""The per-sample gradients of convolution weights, in 1, 2 or 3 dimensions.

A convolution applies its weight (p, c, *kernel) at every output position; the gradient of sample i and direction o at the tap
τ of the kernel is Σ_t δ[i,o,t] ⊗ u[i,t+τ]: one matrix product of δ with a shifted view of the input for each tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as convolution_gradients

from lightning_netsim.jacobian.factors import AbstractFactor, OuterFactor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: convolution_gradients.conv1d_weight,
    2: convolution_gradients.conv2d_weight,
    3: convolution_gradients.conv3d_weight,
}

# A tap of the kernel multiplies small matrices from strided views, which costs about this many times as much for each
# multiplication as one large product (measured on shapes from 1 to 512 channels).
_SHIFTED_VIEW_COST = 1.5
# An addition of two entries in memory is taken to cost this many multiplications inside a matrix product (an estimate).
_SUM_COST = 4
# Formed gradients are kept for the weighted sum that follows a Gram only up to this size.
_KEEP_BYTES = 2**28


@dataclass(frozen=True)
class Geometry:
    """How a convolution without padding steps over its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def view(self, inputs: Tensor, tap: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the entries of `inputs` (..., *S) under the tap at each of the output positions, shape (..., *positions)."""
        shifted = inputs
        first = inputs.ndim - len(self.kernel)
        for axis, (offset, step, dilation, size) in enumerate(zip(tap, self.stride, self.dilation, positions, strict=True)):
            start = offset * dilation
            index = [slice(None)] * inputs.ndim
            index[first + axis] = slice(start, start + step * (size - 1) + 1, step)
            shifted = shifted[tuple(index)]
        return shifted

    def taps(self) -> list[tuple[int, ...]]:
        """Return the taps of the kernel in the order of the weight's entries."""
        return list(product(*map(range, self.kernel)))


def form_gradients(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    """Form the per-sample gradients of a convolution weight.

    Args:
        inputs: shape (B, C, *S), padded already.
        deltas: shape (B, d, O, *S').
        geometry: kernel, stride, dilation and groups g.

    Returns:
        shape (taps, B, d, O, C/g): the taps of the kernel first.
    """
    batch, directions, rows = deltas.shape[:3]
    groups, positions = geometry.groups, deltas.shape[3:]
    channels = inputs.shape[1] // groups
    if batch == 0:
        return deltas.new_zeros(len(geometry.taps()), batch, directions, rows, channels)
    grouped_deltas = torch.unflatten(deltas, 2, (groups, -1)).transpose(1, 2)
    if channels == 1:
        return _form_single_channel(inputs, grouped_deltas, geometry)
    left = grouped_deltas.reshape(batch, groups, -1, positions.numel())
    views = (geometry.view(inputs, tap, positions) for tap in geometry.taps())
    formed = torch.stack([left @ view.reshape(batch, groups, channels, -1).mT for view in views])
    formed = torch.unflatten(formed, 3, (directions, -1)).transpose(2, 3)
    return formed.reshape(len(formed), batch, directions, rows, channels)


def _form_single_channel(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    """Form the gradients where each group has one input channel: one grouped convolution of the input with δ as its kernel."""
    batch, groups, directions, rows = deltas.shape[:4]
    images = inputs.reshape(1, batch * groups, *inputs.shape[2:])
    kernels = deltas.reshape(batch * groups * directions * rows, 1, *deltas.shape[4:])
    convolve = _CONVOLUTIONS[len(geometry.kernel)]
    out = convolve(images, kernels, stride=geometry.dilation, dilation=geometry.stride, groups=batch * groups)
    for axis, size in enumerate(geometry.kernel):
        out = out.narrow(2 + axis, 0, size)
    formed = out.reshape(batch, groups, directions, rows, -1).permute(4, 0, 2, 1, 3)
    return formed.reshape(len(geometry.taps()), batch, directions, groups * rows, 1)


class ConvolutionFactor(AbstractFactor):
    """Gradients of a convolution weight (O, C/g, *kernel).

    Args:
        inputs: u, shape (B, C, *S), padded already.
        deltas: δ, shape (B, d, O, *S').
        geometry: how the kernel steps over the input.
    """

    def __init__(self, inputs: Tensor, deltas: Tensor, geometry: Geometry) -> None:
        self.inputs = inputs
        self.deltas = deltas
        self.geometry = geometry
        self.shape = torch.Size((deltas.shape[2], inputs.shape[1] // geometry.groups, *geometry.kernel))
        self._kept: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.deltas.shape[0], self.deltas.shape[1]

    @property
    def kept_bytes(self) -> int:
        return self.inputs.nbytes + self.deltas.nbytes + (0 if self._kept is None else self._kept.nbytes)

    def select(self, index: Tensor) -> ConvolutionFactor:
        return ConvolutionFactor(self.inputs[index], self.deltas[index], self.geometry)

    def to(self, dtype: torch.dtype) -> ConvolutionFactor:
        return ConvolutionFactor(self.inputs.to(dtype), self.deltas.to(dtype), self.geometry)

    def mix(self, matrix: Tensor) -> ConvolutionFactor:
        deltas = torch.unflatten(matrix.mT @ self.deltas.flatten(2), 2, self.deltas.shape[2:])
        mixed = ConvolutionFactor(self.inputs, deltas, self.geometry)
        if self._kept is not None:
            mixed._kept = torch.unflatten(matrix.mT @ self._kept.flatten(3), 3, self._kept.shape[3:])
        return mixed

    def dense(self) -> Tensor:
        return self._formed().permute(1, 2, 3, 4, 0).flatten(2)

    def entries(self) -> Tensor:
        return self._formed().permute(1, 2, 0, 3, 4).flatten(2)

    def gram(self) -> Tensor:
        if self._pixels_are_cheaper():
            return self._gram_by_pixels()
        formed = self._formed().flatten(3)
        if formed.shape[2] == 1:
            return torch.einsum("tbon,tbon->b", formed, formed).view(-1, 1, 1)
        return (formed @ formed.mT).sum(0)

    def inner(self, other: AbstractFactor) -> Tensor:
        if isinstance(other, ConvolutionFactor) and self._ghost_is_cheaper() and other._ghost_is_cheaper():
            return self._outer().inner(other._outer())
        return super().inner(other)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        if self._kept is not None:
            formed = self._kept.flatten(3).flatten(1, 2)
            total = weight.flatten(0, 1).mT @ formed
            return total.permute(1, 2, 0).reshape(-1, *self.shape)
        deltas = torch.unflatten(torch.einsum("bdn,bdc->cbn", self.deltas.flatten(2), weight), 2, self.deltas.shape[2:])
        return torch.stack([self._batch_gradient(column) for column in deltas])

    def dot(self, direction: Tensor) -> Tensor:
        return torch.einsum("bdn,bcn->bdc", self.deltas.flatten(2), self._moved(direction))

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, ConvolutionFactor):
            return super().trace_inner(other)
        if self._ghost_is_cheaper() and other._ghost_is_cheaper():
            return self._outer().trace_inner(other._outer())
        # The order of the entries does not matter as long as it is the same: no permutation.
        left, right = (factor._formed().transpose(0, 1).flatten(1) for factor in (self, other))
        return left @ right.mT

    def trace_dot(self, direction: Tensor) -> Tensor:
        return (self.deltas.flatten(2) * self._moved(direction)).sum((1, 2))

    def _moved(self, direction: Tensor) -> Tensor:
        """Return the layer's output with `direction`, shape (c, *shape), as its weight: shape (B, c, O·positions)."""
        geometry, columns = self.geometry, direction.shape[0]
        convolve = _CONVOLUTIONS[len(geometry.kernel)]
        # Grouped convolutions need the columns inside their group.
        kernels = torch.unflatten(direction, 1, (geometry.groups, -1)).transpose(0, 1).flatten(0, 2)
        moved = convolve(self.inputs, kernels, None, geometry.stride, 0, geometry.dilation, geometry.groups)
        for axis, size in enumerate(self.deltas.shape[3:]):
            moved = moved.narrow(2 + axis, 0, size)
        return torch.unflatten(moved, 1, (geometry.groups, columns, -1)).transpose(1, 2).flatten(2)

    def _formed(self) -> Tensor:
        """Return the gradients with the taps first, (taps, B, d, O, C/g), and keep them where they are small."""
        if self._kept is not None:
            return self._kept
        formed = form_gradients(self.inputs, self.deltas, self.geometry)
        if formed.nbytes <= _KEEP_BYTES:
            self._kept = formed
        return formed

    def _pixels_are_cheaper(self) -> bool:
        """Return whether the Gram is cheaper from inner products of pixels than from formed gradients."""
        if self.geometry.groups > 1 or self._kept is not None:
            return False
        directions, rows = self.deltas.shape[1], self.shape[0]
        positions, pixels = self.deltas.shape[3:], self.inputs.shape[2:]
        count, size = positions.numel(), pixels.numel()
        sums, left = 0, size**2
        for kernel, position, pixel in zip(self.geometry.kernel, positions, pixels, strict=True):
            left = left // pixel**2 * position**2
            sums += kernel * left
        by_pixels = size**2 * self.inputs.shape[1] + _SUM_COST * sums + directions * rows * count * (count + directions)
        return by_pixels < self._forming_cost()

    def _gram_by_pixels(self) -> Tensor:
        """Return GᵀG without the gradients: patches overlap, so their inner products are sums of those of pixels.

        ⟨patch_t, patch_t'⟩ = Σ_τ ⟨u[t+τ], u[t'+τ]⟩, summed over the taps of one axis after the other, and then
        GᵀG = Σ_{t,t'} ⟨patch_t, patch_t'⟩ δ_tᵀδ_t'.
        """
        dimensions, positions = len(self.geometry.kernel), self.deltas.shape[3:]
        pixels = self.inputs.flatten(2)
        products = (pixels.mT @ pixels).view(-1, *self.inputs.shape[2:], *self.inputs.shape[2:])
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.geometry.kernel, self.geometry.stride, self.geometry.dilation, strict=True)
        ):
            total: Tensor | None = None
            for tap in range(kernel):
                where = slice(tap * dilation, tap * dilation + stride * (positions[axis] - 1) + 1, stride)
                index = [slice(None)] * products.ndim
                index[1 + axis] = index[1 + dimensions + axis] = where
                view = products[tuple(index)]
                total = view if total is None else total + view
            products = products if total is None else total
        count = positions.numel()
        deltas = self.deltas.flatten(3)
        moved = deltas @ products.reshape(-1, 1, count, count)
        return moved.flatten(2) @ deltas.flatten(2).mT

    def _forming_cost(self) -> float:
        directions, positions = self.deltas.shape[1], self.deltas.shape[3:].numel()
        return directions * self.shape.numel() * (_SHIFTED_VIEW_COST * positions + directions)

    def _ghost_is_cheaper(self) -> bool:
        """Return whether inner products of pairs are cheaper from patches than from formed gradients."""
        if self.geometry.groups > 1 or self._kept is not None:
            return False
        directions, positions, columns = self.deltas.shape[1], self.deltas.shape[3:].numel(), self.shape[1:].numel()
        ghost = positions**2 * (columns + directions**2 * self.shape[0]) + positions * columns
        return ghost < self._forming_cost()

    def _outer(self) -> OuterFactor:
        """Return the same gradients as a linear layer on patches: u (B, T, C·taps), δ (B, d, T, O)."""
        positions = self.deltas.shape[3:]
        views = [self.geometry.view(self.inputs, tap, positions).flatten(2) for tap in self.geometry.taps()]
        patches = torch.stack(views, 2).flatten(1, 2).mT
        return OuterFactor(patches, self.deltas.flatten(3).mT)

    def _batch_gradient(self, deltas: Tensor) -> Tensor:
        """Return the ordinary weight gradient, summed over the batch, for `deltas` of shape (B, O, *S')."""
        gradient = _WEIGHT_GRADIENTS[len(self.geometry.kernel)]
        geometry = self.geometry
        return gradient(self.inputs, self.shape, deltas, geometry.stride, 0, geometry.dilation, geometry.groups)
