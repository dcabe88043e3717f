"""The per-sample gradients of convolution weights, in 1, 2 or 3 dimensions.

A convolution applies its weight (O, C, *kernel) at every output position t, to the patch of its input there: the gradient of
sample i and direction o is Σ_t δ[i,o,t] ⊗ patch[i,t].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, OuterFactor, row_products
from lightning_netsim.jacobian.sketch import SketchProjection

# Measured on sixteen shapes (1 to 512 channels, 2² to 32² positions, 1 and 4 directions, one core), where a multiplication in a
# large product takes 20 to 30 ps: an addition of two entries in memory takes as long as about 4, and a formed entry, from
# writing it to reading it for the Gram and the sum, as long as 40 more than a sum without forming. The faster way to Gram and
# sum is then chosen in 30 of 32 cases; in the others it would have taken 0.7 of the time.
_SUM_COST = 4
_ENTRY_COST = 40
# Formed gradients are kept for the products that follow a Gram only up to this size.
_KEEP_BYTES = 2**28
# On a CPU, the gradients of all samples come from one convolution where they have few numbers for each position, and enough
# channels: it copies no patches, and is up to twice as fast there.
_NUMBERS_PER_POSITION = 40
_CHANNELS_AT_ONCE = 4
# Patches are copied and multiplied so many bytes at a time: on a CPU, what the cache of one core holds.
_PATCH_BYTES = {"cpu": 2**20}
_PATCH_BYTES_ELSEWHERE = 2**28


@dataclass(frozen=True)
class Geometry:
    """How a convolution steps over its input, which is padded by `padding` zeros on both sides of each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]

    def padded(self, inputs: Tensor) -> Tensor:
        """Return `inputs` (B, C, *S) with the padding."""
        sides = [size for size in reversed(self.padding) for _ in range(2)]
        return F.pad(inputs, sides) if any(sides) else inputs

    def positions(self, inputs: Tensor) -> list[int]:
        """Return how many output positions there are along each dimension for `inputs` (B, C, *S)."""
        sides = zip(inputs.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        return [(size + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for size, pad, dilation, kernel, step in sides]

    def patches(self, inputs: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the entries of `inputs` (B, C, *S) under the kernel at each output position, shape (B, g, C/g·taps, T)."""
        view = self.padded(inputs)
        for axis, (size, step, dilation, count) in enumerate(
            zip(self.kernel, self.stride, self.dilation, positions, strict=True), start=2
        ):
            view = view.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation].narrow(axis, 0, count)
        axes = range(2, 2 + len(positions))
        view = view.permute(0, 1, *(axis + len(positions) for axis in axes), *axes)
        columns = inputs.shape[1] // self.groups * math.prod(self.kernel)
        return view.reshape(len(inputs), self.groups, columns, math.prod(positions))

    def convolve(self, inputs: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Return the convolution of `inputs` (B, C, *S) with `weight`."""
        return torch.convolution(inputs, weight, None, self.stride, self.padding, self.dilation, False, [0], groups)

    def input_gradient(self, shape: Sequence[int], weight: Tensor, deltas: Tensor, groups: int) -> Tensor:
        """Return the gradient of ⟨convolve(u, weight), deltas⟩ with respect to u of `shape`."""
        return self._gradients(deltas, deltas.new_empty(1).expand(shape), weight, groups, (True, False))[0]

    def weight_gradient(self, inputs: Tensor, shape: Sequence[int], deltas: Tensor, groups: int) -> Tensor:
        """Return the gradient of ⟨convolve(inputs, W), deltas⟩ with respect to W of `shape`."""
        return self._gradients(deltas, inputs, deltas.new_empty(1).expand(shape), groups, (False, True))[1]

    def _gradients(
        self, deltas: Tensor, inputs: Tensor, weight: Tensor, groups: int, needed: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        steps = (self.stride, self.padding, self.dilation)
        found = torch.ops.aten.convolution_backward(deltas, inputs, weight, None, *steps, False, [0], groups, (*needed, False))
        return found[0], found[1]


def form_gradients(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    """Form the per-sample gradients of a convolution weight.

    Args:
        inputs: shape (B, C, *S).
        deltas: shape (B, d, O, *S').
        geometry: kernel, stride, dilation and groups g.

    Returns:
        shape (B, d, O, C/g, *kernel), differentiable.
    """
    if not (torch.is_grad_enabled() and (inputs.requires_grad or deltas.requires_grad)):
        return _form(inputs, deltas, geometry)
    formed: Tensor = _FormedGradients.apply(inputs, deltas, geometry)
    return formed


def _form(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    (batch, directions, rows), positions = deltas.shape[:3], deltas.shape[3:]
    channels = inputs.shape[1] // geometry.groups
    shape = torch.Size((batch, directions, rows, channels, *geometry.kernel))
    if batch == 0:
        return deltas.new_zeros(shape)
    grouped = torch.unflatten(deltas, 2, (geometry.groups, -1)).transpose(1, 2)
    few = shape[1:].numel() <= _NUMBERS_PER_POSITION * positions.numel() and (directions == 1 or geometry.groups == 1)
    if deltas.device.type == "cpu" and few and directions * inputs.shape[1] >= _CHANNELS_AT_ONCE:
        # The weight gradient of one convolution of one picture, with a group of channels for each sample.
        flat, groups = torch.Size((batch * directions * rows, *shape[3:])), batch * geometry.groups
        formed = geometry.weight_gradient(inputs.flatten(0, 1)[None], flat, grouped.flatten(0, 3)[None], groups)
        formed = formed.view(batch, geometry.groups, directions * rows // geometry.groups, -1)
    else:
        formed = _form_by_patches(inputs, grouped, geometry)
    return torch.unflatten(formed, 2, grouped.shape[2:4]).transpose(1, 2).reshape(shape)


class _FormedGradients(torch.autograd.Function):
    """`form_gradients` with a derivative that takes no patches, and so a third of the time."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(inputs, deltas)
        ctx.geometry = geometry
        return _form(inputs, deltas, geometry)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, deltas = ctx.saved_tensors
        with torch.autocast(deltas.device.type, enabled=False):
            return *pull_gradients(inputs, deltas, cotangent, ctx.geometry, ctx.needs_input_grad[:2]), None


def pull_gradients(
    inputs: Tensor, deltas: Tensor, cotangent: Tensor, geometry: Geometry, needed: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients, with respect to `inputs` and `deltas`, of ⟨form_gradients(inputs, deltas), cotangent⟩.

    That is two convolutions in which every sample has its own weight: a group of channels of one large picture.

    Args:
        inputs: shape (B, C, *S).
        deltas: shape (B, d, O, *S').
        cotangent: shape (B, d, O, C/g, *kernel), or with the last dimensions flattened.
        geometry: kernel, stride, dilation and groups g.
        needed: which of the two gradients.
    """
    (batch, directions, rows), positions = deltas.shape[:3], deltas.shape[3:]
    groups = batch * geometry.groups
    # Every group of each sample has the directions of its channels side by side.
    weight = cotangent.reshape(batch, directions, geometry.groups, rows // geometry.groups, -1).transpose(1, 2)
    weight = weight.reshape(-1, inputs.shape[1] // geometry.groups, *geometry.kernel)
    for_inputs = for_deltas = None
    if needed[1]:
        moved = geometry.convolve(inputs.flatten(0, 1)[None], weight, groups)
        for axis, size in enumerate(positions, start=2):
            moved = moved.narrow(axis, 0, size)
        moved = moved.reshape(batch, geometry.groups, directions, -1, *positions)
        for_deltas = moved.transpose(1, 2).reshape(deltas.shape)
    if needed[0]:
        grouped = torch.unflatten(deltas, 2, (geometry.groups, -1)).transpose(1, 2).reshape(1, -1, *positions)
        missing = [
            size for wanted, have in zip(geometry.positions(inputs), positions, strict=True) for size in (wanted - have, 0)
        ]
        grouped = F.pad(grouped, missing[::-1]) if any(missing) else grouped
        shape = (1, inputs.shape[0] * inputs.shape[1], *inputs.shape[2:])
        for_inputs = geometry.input_gradient(shape, weight, grouped, groups).view(inputs.shape)
    return for_inputs, for_deltas


def _form_by_patches(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    """Form the gradients, shape (B, g, d·O/g, C/g·taps), for δ of shape (B, g, d, O/g, *S'): one product with the patches."""
    batch, groups, positions = len(inputs), geometry.groups, deltas.shape[4:]
    left = deltas.reshape(batch, groups, -1, positions.numel())
    columns = inputs.shape[1] // groups * math.prod(geometry.kernel)
    formed = left.new_empty(*left.shape[:3], columns)
    room = _PATCH_BYTES.get(left.device.type, _PATCH_BYTES_ELSEWHERE)
    at_a_time = max(1, room // (groups * columns * positions.numel() * left.element_size()))
    for some, some_left, out in zip(*(torch.split(t, at_a_time) for t in (inputs, left, formed)), strict=True):
        patches = geometry.patches(some, positions)
        torch.bmm(some_left.flatten(0, 1), patches.flatten(0, 1).mT, out=out.flatten(0, 1))
    return formed


class ConvolutionFactor(AbstractFactor):
    """Gradients of a convolution weight (O, C/g, *kernel).

    Args:
        inputs: u, shape (B, C, *S).
        deltas: δ, shape (B, d, O, *S').
        geometry: how the kernel steps over the input.
    """

    def __init__(self, inputs: Tensor, deltas: Tensor, geometry: Geometry) -> None:
        self.inputs = inputs
        self.deltas = deltas
        self.geometry = geometry
        self.shape = torch.Size((deltas.shape[2], inputs.shape[1] // geometry.groups, *geometry.kernel))
        self._kept: DenseFactor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.inputs, self.deltas

    def with_parts(self, parts: Sequence[Tensor]) -> ConvolutionFactor:
        inputs, deltas = parts
        return ConvolutionFactor(inputs, deltas, self.geometry)

    def select(self, index: Tensor | slice) -> ConvolutionFactor:
        return self._with_kept(super().select(index).parts, lambda kept: kept.select(index))

    def detached(self) -> ConvolutionFactor:
        return self._with_kept(super().detached().parts, lambda kept: kept.detached())

    def _with_kept(self, parts: Sequence[Tensor], change: Callable[[DenseFactor], AbstractFactor]) -> ConvolutionFactor:
        """Return a factor with other parts, that keeps the changed gradients if this one keeps any."""
        changed = self.with_parts(parts)
        changed._kept = None if self._kept is None else change(self._kept).formed()
        return changed

    @property
    def kept_bytes(self) -> int:
        return super().kept_bytes + (0 if self._kept is None else self._kept.kept_bytes)

    def packed(self, fast: bool) -> AbstractFactor:
        numbers, formed = sum(math.prod(part.shape[1:]) for part in self.parts), self.size[1] * self.shape.numel()
        if fast and self._ghost_cost() < formed:
            return self._outer()
        return self.formed() if fast or formed <= numbers else self.owned()

    def mix(self, matrix: Tensor) -> ConvolutionFactor:
        deltas = torch.unflatten(matrix.mT @ self.deltas.flatten(2), 2, self.deltas.shape[2:])
        mixed = ConvolutionFactor(self.inputs, deltas, self.geometry)
        mixed._kept = None if self._kept is None else self._kept.mix(matrix)
        return mixed

    def dense(self) -> Tensor:
        return self.formed().dense()

    def hold_formed(self) -> None:
        self.formed()

    def formed(self) -> DenseFactor:
        """Return the same gradients, formed; they are kept where they are small."""
        if self._kept is not None:
            return self._kept
        formed = DenseFactor(form_gradients(self.inputs, self.deltas, self.geometry))
        if formed.kept_bytes <= _KEEP_BYTES:
            self._kept = formed
        return formed

    def gram(self) -> Tensor:
        return self._gram_by_pixels() if self._pixels_are_cheaper() else self.formed().gram()

    def pull_dense(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return pull_gradients(self.inputs, self.deltas, cotangent, self.geometry)

    def inner(self, other: AbstractFactor) -> Tensor:
        if isinstance(other, ConvolutionFactor) and self._ghosts_are_cheaper(other, self.size[1] * other.size[1]):
            return self._outer().inner(other._outer())
        return super().inner(other)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept.weighted_sum(weight)
        deltas = torch.unflatten(torch.einsum("bdn,bdc->cbn", self.deltas.flatten(2), weight), 2, self.deltas.shape[2:])
        groups = self.geometry.groups
        return torch.stack([self.geometry.weight_gradient(self.inputs, self.shape, column, groups) for column in deltas])

    def dot(self, direction: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept.dot(direction)
        return torch.einsum("bdn,bcn->bdc", self.deltas.flatten(2), self._moved(direction))

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, ConvolutionFactor):
            return super().trace_inner(other)
        # Patches are better where no gradients are formed, or larger ones.
        formed_are_larger = self.deltas.shape[3:].numel() <= self.size[1] * self.shape[0]
        by_rows = self.geometry.groups == 1 and self._kept is other._kept is None and formed_are_larger
        if not by_rows and not self._ghosts_are_cheaper(other, self.size[1]):
            return super().trace_inner(other)
        left = self._outer()
        return left.trace_inner(left if other is self else other._outer())

    def trace_dot(self, direction: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept.trace_dot(direction)
        return row_products(self.deltas.flatten(1), self._moved(direction).flatten(1))

    def sketch(self, projection: SketchProjection, name: str) -> Tensor:
        return super().sketch(projection, name) if self._kept is None else self._kept.sketch(projection, name)

    def pair_cost(self) -> tuple[int, int]:
        formed = self.size[1] * self.shape.numel()
        ghost = self._ghost_cost()
        return (int(ghost), 0) if ghost < formed else (formed, formed * self.deltas.shape[3:].numel())

    def _moved(self, direction: Tensor) -> Tensor:
        """Return the layer's output with `direction`, shape (c, *shape), as its weight: shape (B, c, O·positions)."""
        geometry, columns = self.geometry, direction.shape[0]
        # Grouped convolutions need the columns inside their group.
        kernels = torch.unflatten(direction, 1, (geometry.groups, -1)).transpose(0, 1).flatten(0, 2)
        moved = geometry.convolve(self.inputs, kernels, geometry.groups)
        for axis, size in enumerate(self.deltas.shape[3:]):
            moved = moved.narrow(2 + axis, 0, size)
        return torch.unflatten(moved, 1, (geometry.groups, columns, -1)).transpose(1, 2).flatten(2)

    def _pixels_are_cheaper(self) -> bool:
        """Return whether the Gram is cheaper from inner products of pixels than from formed gradients."""
        if self.geometry.groups > 1 or self._kept is not None:
            return False
        directions, rows = self.deltas.shape[1], self.shape[0]
        positions = self.deltas.shape[3:]
        pixels = [size + 2 * pad for size, pad in zip(self.inputs.shape[2:], self.geometry.padding, strict=True)]
        count, size = positions.numel(), math.prod(pixels)
        sums, left = 0, size**2
        for kernel, position, pixel in zip(self.geometry.kernel, positions, pixels, strict=True):
            left = left // pixel**2 * position**2
            sums += kernel * left
        by_pixels = size**2 * self.inputs.shape[1] + _SUM_COST * sums + directions * rows * count * (count + directions)
        return by_pixels < directions * self.shape.numel() * (_ENTRY_COST + directions)

    def _gram_by_pixels(self) -> Tensor:
        """Return GᵀG without the gradients: patches overlap, so their inner products are sums of those of pixels.

        ⟨patch_t, patch_t'⟩ = Σ_τ ⟨u[t+τ], u[t'+τ]⟩, summed over the taps of one axis after the other, and then
        GᵀG = Σ_{t,t'} ⟨patch_t, patch_t'⟩ δ_tᵀδ_t'.
        """
        dimensions, positions = len(self.geometry.kernel), self.deltas.shape[3:]
        inputs = self.geometry.padded(self.inputs)
        pixels = inputs.flatten(2)
        products = (pixels.mT @ pixels).view(-1, *inputs.shape[2:], *inputs.shape[2:])
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

    def _ghost_cost(self, products: int | None = None) -> float:
        """Return the multiplications for one pair of samples from their patches, infinite where there are groups.

        Args:
            products: how many products of two directions are wanted; d by default, for the trace.
        """
        positions, columns = self.deltas.shape[3:].numel(), self.shape[1:].numel()
        products = self.size[1] if products is None else products
        return positions**2 * (columns + products * self.shape[0]) if self.geometry.groups == 1 else math.inf

    def _ghosts_are_cheaper(self, other: ConvolutionFactor, products: int) -> bool:
        """Return whether inner products with the samples of `other` are cheaper from patches than from formed gradients."""
        pairs = self.size[0] * other.size[0]
        unformed = [factor for factor in (self, other) if factor._kept is None]
        forming = sum(factor.deltas[:, :, 0].numel() for factor in unformed)
        return pairs * self._ghost_cost(products) < self.shape.numel() * (pairs * products + forming)

    def _outer(self) -> OuterFactor:
        """Return the same gradients as those of a linear layer on patches: u (B, T, C·taps), δ (B, d, T, O)."""
        patches = self.geometry.patches(self.inputs, self.deltas.shape[3:]).squeeze(1)
        return OuterFactor(patches.mT, self.deltas.flatten(3).mT, self.shape)
