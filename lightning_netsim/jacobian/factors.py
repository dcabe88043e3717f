"""The gradients of one parameter for every sample, in the form that is cheapest to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import expected
from lightning_netsim.jacobian.sketch import SketchProjection

#: What gradients that are formed for one product may take at a time.
WORKING_BYTES = 2**28

# What gradients that are formed for a sketch or a derivative may take at a time: on a CPU, what its cache holds.
_CACHED_BYTES = {"cpu": 2**22}

# What is copied or formed of gradients for a tile of pairs at a time: on a CPU, what malloc keeps for the next piece instead of
# returning it to the system, which would take longer than the products.
_PIECES_BYTES = {"cpu": 2**25}

# One sum in float32 is no longer than this.
_SUMMED_AT_ONCE = 2**16


class AbstractFactor(ABC):
    """Per-sample gradients G of one parameter of shape `shape`, for B samples and d directions.

    A kind of factor is known by its `parts`, tensors with the samples along dimension 0, and by how to make products of them.
    """

    shape: torch.Size

    @property
    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """Return the tensors that are kept, each with B as dimension 0; the last one has shape (B, d, ...)."""

    @abstractmethod
    def with_parts(self, parts: Sequence[Tensor]) -> AbstractFactor:
        """Return a factor of the same kind that keeps `parts` instead, for as many samples as these have."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradients, shape (B, d, n) with n the number of entries of the parameter."""

    @abstractmethod
    def mix(self, matrix: Tensor) -> AbstractFactor:
        """Return G_i matrix_i, for `matrix` of shape (B, d, d'): d' new directions."""

    @abstractmethod
    def pair_cost(self) -> tuple[int, int]:
        """Return the multiplications for tr(GᵀG') of a pair of many samples, and those to form one sample's gradient first."""

    @property
    def size(self) -> tuple[int, int]:
        """Return (B, d)."""
        return self.parts[-1].shape[0], self.parts[-1].shape[1]

    @property
    def kept_bytes(self) -> int:
        """Return the number of bytes that the factor keeps."""
        return sum(part.nbytes for part in self.parts)

    def select(self, index: Tensor | slice) -> AbstractFactor:
        """Return the samples `index`: shape (B',), int64, or a slice, which copies nothing."""
        if isinstance(index, slice):
            return self.with_parts([part[index] for part in self.parts])
        return self.with_parts([part.index_select(0, index) for part in self.parts])

    def to(self, dtype: torch.dtype) -> AbstractFactor:
        """Return the factor in `dtype`."""
        return self.with_parts([part.to(dtype) if part.is_floating_point() else part for part in self.parts])

    def moved(self, device: torch.device) -> AbstractFactor:
        """Return the factor on `device`."""
        return self.with_parts([part.to(device) for part in self.parts])

    def detached(self) -> AbstractFactor:
        """Return the factor off the autograd graph."""
        return self.with_parts([part.detach() for part in self.parts])

    def owned(self) -> AbstractFactor:
        """Return the factor with parts that keep no larger tensor alive."""
        views = (part.untyped_storage().nbytes() > part.nbytes for part in self.parts)
        return self.with_parts([part.clone() if view else part for part, view in zip(self.parts, views, strict=True)])

    def hold_formed(self) -> None:  # noqa: B027
        """Form the gradients, and hold on to them, where several products to come are then cheaper."""

    def formed(self) -> DenseFactor:
        """Return the same gradients, formed."""
        return DenseFactor(self.dense().view(*self.size, *self.shape))

    def packed(self, fast: bool) -> AbstractFactor:
        """Return the form in which the gradients of many samples are stored, which depends on shapes only.

        Args:
            fast: the one with the fastest inner products of given pairs; else the one of fewest bytes.
        """
        return self.owned()

    def empty(self, num_samples: int) -> AbstractFactor:
        """Return room for so many samples in the same form; what stands in it is undefined."""
        return self.with_parts([part.new_empty(num_samples, *part.shape[1:]) for part in self.parts])

    def write(self, start: int, other: AbstractFactor) -> AbstractFactor:
        """Copy the samples of `other` in, from place `start` on; return the factor that then holds them.

        That is another one where the samples need more room than those before, as longer sequences do.
        """
        if type(other) is not type(self):
            return self.formed().write(start, other.formed())
        if other.size[1] != self.size[1]:
            raise expected("other", f"of {self.size[1]} directions", str(other.size[1]))
        pairs = zip(self.parts, other.parts, strict=True)
        shapes = [tuple(map(max, mine.shape[1:], new.shape[1:])) for mine, new in pairs]
        held = self._padded_to(shapes)
        for place, new in zip(held.parts, other._padded_to(shapes).parts, strict=True):
            place[start : start + len(new)] = new
        return held

    def clear(self, start: int, stop: int) -> None:
        """Make the gradients of the samples from `start` to before `stop` zero."""
        for part in self.parts:
            part[start:stop] = 0

    def _padded_to(self, shapes: Sequence[tuple[int, ...]]) -> AbstractFactor:
        """Return the factor with zeros beside its parts: where δ is zero, there is no gradient."""
        parts = []
        for part, shape in zip(self.parts, shapes, strict=True):
            missing = [size for wanted, have in zip(shape, part.shape[1:], strict=True) for size in (wanted - have, 0)]
            parts.append(F.pad(part, missing[::-1]) if any(missing) else part)
        return self.with_parts(parts)

    def joined(self, others: Sequence[AbstractFactor]) -> AbstractFactor:
        """Return the sum of the gradients with those of `others`."""
        total = sum((other.dense() for other in others), self.dense())
        return DenseFactor(total.view(*self.size, *self.shape))

    def derivative(self, motion: Sequence[Tensor | None]) -> AbstractFactor | None:
        """Return the derivative of the gradients, as its parts move by `motion`; None where it is zero.

        Gradients are linear in each part.
        """
        parts = self.parts
        terms = [
            self.with_parts([*parts[:place], moving, *parts[place + 1 :]])
            for place, moving in enumerate(motion)
            if moving is not None
        ]
        return sum_of_calls(terms) if terms else None

    def gram(self) -> Tensor:
        """Return GᵀG of each sample, shape (B, d, d)."""
        return self.row_inner(self)

    def row_inner(self, other: AbstractFactor) -> Tensor:
        """Return GᵀG' of corresponding samples, shape (B, d, d')."""
        return product(self.dense(), other.dense())

    def inner(self, other: AbstractFactor) -> Tensor:
        """Return GᵀG' of each pair of samples, shape (B, B', d, d')."""
        left, right = self.dense(), other.dense()
        products = product(left.flatten(0, 1), right.flatten(0, 1))
        return products.view(*left.shape[:2], *right.shape[:2]).permute(0, 2, 1, 3)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return Σ_i G_i weight_i for `weight` of shape (B, d, c), shape (c, *shape)."""
        gradients = self.dense().flatten(0, 1)
        return (weight.flatten(0, 1).mT @ gradients).view(-1, *self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        """Return G_iᵀ direction for `direction` of shape (c, *shape), shape (B, d, c)."""
        return product(self.dense(), direction.reshape(len(direction), -1))

    def kernel_product(self, columns: Tensor) -> Tensor:
        """Return Σ_j G_iᵀ G_j columns_j for `columns` of shape (B, d, m): the kernel matrix times vectors, (B, d, m)."""
        return self.dot(self.weighted_sum(columns))

    def pull(self, own: Tensor | None, receive: Tensor, send: Tensor) -> tuple[Tensor | None, ...]:
        """Return, for each part, the gradient of ⟨G, G'⟩ with G'_i = G_i own_i + Σ_j G_j send_j receive_iᵀ held constant.

        Whatever is computed from GᵀG by products has its derivative in this form.

        Args:
            own: shape (B, d, d), or None for zeros.
            receive: shape (B, d, m).
            send: shape (B, d, m).
        """
        sums, place, pieces = self.weighted_sum(send).reshape(send.shape[2], -1), 0, []
        for some in self._split(self._cached_at_once()):
            rows = slice(place, place + some.size[0])
            cotangent = torch.unflatten(receive[rows].flatten(0, 1) @ sums, 0, some.size)
            if own is not None:
                cotangent.baddbmm_(own[rows].mT, some.dense())
            pieces.append(some.pull_dense(cotangent))
            place = rows.stop
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))

    def pull_dense(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Return, for each part, the gradient of ⟨dense(), cotangent⟩ for `cotangent` of shape (B, d, n)."""
        with torch.enable_grad():
            parts = [part.detach().requires_grad_(part.is_floating_point()) for part in self.parts]
            formed = self.with_parts(parts).dense()
        floating = [part for part in parts if part.requires_grad]
        found = iter(torch.autograd.grad(formed, floating, cotangent))
        return tuple(next(found) if part.requires_grad else None for part in parts)

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        """Return tr(GᵀG') of each pair of samples with equally many directions, shape (B, B')."""
        at_a_time = max(1, WORKING_BYTES // (self._formed_bytes() or 1))
        rows = []
        for left in self._split(at_a_time):
            gradients = left.dense().flatten(1)
            rows.append(torch.cat([product(gradients, some.dense().flatten(1)) for some in other._split(at_a_time)], 1))
        return torch.cat(rows)

    def trace_tile(self, rows: Tensor, other: AbstractFactor, samples: Tensor) -> Tensor:
        """Return tr(GᵀG') of the samples `rows`, int64, and the samples `samples` of `other`."""
        return self.select(rows).trace_inner(other.select(samples))

    def trace_dot(self, direction: Tensor) -> Tensor:
        """Return tr(G_iᵀ direction) for `direction` of shape (d, *shape), shape (B,)."""
        return product(self.dense().flatten(1), direction.reshape(1, -1)).squeeze(1)

    def sketch(self, projection: SketchProjection, name: str) -> Tensor:
        """Return the sketched gradients, shape (B, d, K_t), of this parameter, which `projection` knows as `name`."""
        return torch.cat([projection.apply(name, some.dense()) for some in self._split(self._cached_at_once())])

    def _cached_at_once(self) -> int:
        """Return for how many samples formed gradients stay in the cache."""
        return max(1, _CACHED_BYTES.get(self.parts[-1].device.type, WORKING_BYTES) // (self._formed_bytes() or 1))

    def _split(self, at_a_time: int) -> list[AbstractFactor]:
        """Return at most so many samples at a time: the factor itself if it has no more."""
        if self.size[0] <= at_a_time:
            return [self]
        return [self.select(slice(start, start + at_a_time)) for start in range(0, self.size[0], at_a_time)]

    def _formed_bytes(self) -> int:
        """Return the bytes of one sample's gradient."""
        return self.size[1] * self.shape.numel() * self.parts[-1].element_size()


def pieces_bytes(device: torch.device) -> int:
    """Return what is copied or formed of gradients for a tile of pairs at a time."""
    return _PIECES_BYTES.get(device.type, WORKING_BYTES)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ rightᵀ for rows of any length: one sum of millions of products in float32 loses four digits."""
    if left.shape[-1] <= _SUMMED_AT_ONCE:
        return left @ right.mT
    pieces = zip(torch.split(left, _SUMMED_AT_ONCE, -1), torch.split(right, _SUMMED_AT_ONCE, -1), strict=True)
    first, *others = (some @ opposite.mT for some, opposite in pieces)
    return sum(others, first)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return ⟨left_i, right_i⟩ of matrices (B, n), shape (B,)."""
    return product(left.unsqueeze(1), right.unsqueeze(1)).flatten()


class DenseFactor(AbstractFactor):
    """Gradients kept as they are: small parameters and whatever had to be formed anyway.

    Args:
        gradients: shape (B, d, *shape).
    """

    def __init__(self, gradients: Tensor) -> None:
        self.shape = gradients.shape[2:]
        self._gradients = gradients.flatten(2) if gradients.ndim > 2 else gradients.unsqueeze(2)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self._gradients,)

    def with_parts(self, parts: Sequence[Tensor]) -> DenseFactor:
        (gradients,) = parts
        return DenseFactor(gradients.view(*gradients.shape[:2], *self.shape))

    def formed(self) -> DenseFactor:
        return self

    def dense(self) -> Tensor:
        return self._gradients

    def mix(self, matrix: Tensor) -> DenseFactor:
        one = matrix.shape[1] == matrix.shape[2] == 1
        return self.with_parts([self._gradients * matrix if one else matrix.mT @ self._gradients])

    def sketch(self, projection: SketchProjection, name: str) -> Tensor:
        return projection.apply(name, self._gradients)

    def pull_dense(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (cotangent,)

    def pair_cost(self) -> tuple[int, int]:
        return self.size[1] * self.shape.numel(), 0

    def trace_tile(self, rows: Tensor, other: AbstractFactor, samples: Tensor) -> Tensor:
        if not isinstance(other, DenseFactor):
            return super().trace_tile(rows, other, samples)
        left, right = self._gradients.flatten(1), other.dense().flatten(1)
        total = left.new_zeros(len(rows), len(samples))
        width = max(1, pieces_bytes(left.device) // ((len(rows) + len(samples)) * left.element_size()))
        for some, opposite in zip(torch.split(left, width, 1), torch.split(right, width, 1), strict=True):
            total += product(some.index_select(0, rows), opposite.index_select(0, samples))
        return total


def sum_of_calls(factors: Iterable[AbstractFactor]) -> AbstractFactor:
    """Return the gradients of a parameter that several calls of its layer use: their sum."""
    first, *others = factors
    if not others:
        return first
    same = all(type(factor) is type(first) for factor in others)
    return first.joined(others) if same else first.formed().joined(others)


# Measured on seven shapes (1 to 256 positions, widths 40 to 2048, one core), in multiplications inside a large product: a
# Fourier transform of K numbers takes as long as 10 K log2 K + 15,000 of them, and folding a formed entry as long as 20. The
# faster way is then chosen in 33 of 35 cases; in the others it would have taken 0.9 of the time.
_TRANSFORM_COST, _TRANSFORM_START = 10, 15_000

_FOLDING_COST = 20


class OuterFactor(AbstractFactor):
    """Gradients Σ_t δ_t ⊗ u_t of a weight (p, q) that is applied at T positions.

    Args:
        inputs: u, shape (B, T, q).
        deltas: δ, shape (B, d, T, p).
        shape: of the weight, where it is not (p, q): p first, and q entries after it.
    """

    def __init__(self, inputs: Tensor, deltas: Tensor, shape: torch.Size | None = None) -> None:
        self.inputs = inputs
        self.deltas = deltas
        self.shape = shape or torch.Size((deltas.shape[3], inputs.shape[2]))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.inputs, self.deltas

    def with_parts(self, parts: Sequence[Tensor]) -> OuterFactor:
        inputs, deltas = parts
        return OuterFactor(inputs, deltas, self.shape)

    def packed(self, fast: bool) -> AbstractFactor:
        _, directions, positions, rows = self.deltas.shape
        columns = self.inputs.shape[2]
        kept = self._ghost_cost() if fast else positions * (columns + directions * rows)
        return (self.formed() if directions * rows * columns < kept else self).owned()

    def joined(self, others: Sequence[AbstractFactor]) -> AbstractFactor:
        inputs = [factor.parts[0] for factor in (self, *others)]
        deltas = [factor.parts[1] for factor in (self, *others)]
        return self.with_parts([torch.cat(inputs, 1), torch.cat(deltas, 2)])

    def mix(self, matrix: Tensor) -> OuterFactor:
        return self.with_parts([self.inputs, torch.einsum("bdtp,bdc->bctp", self.deltas, matrix)])

    def dense(self) -> Tensor:
        if self.inputs.shape[1] == 1:
            return (self.deltas[:, :, 0, :, None] * self.inputs[:, None, 0, None, :]).flatten(2)
        batch, directions, positions, rows = self.deltas.shape
        stacked = self.deltas.transpose(2, 3).reshape(batch, directions * rows, positions)
        return (stacked @ self.inputs).view(batch, directions, rows * self.inputs.shape[2])

    def row_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, OuterFactor):
            return super().row_inner(other)
        _, directions, positions, rows = self.deltas.shape
        columns = self.inputs.shape[2]
        ghost = positions**2 * (columns + directions * rows) + directions**2 * positions * rows
        formed = directions * rows * columns * (positions + directions)
        if ghost > formed:
            return super().row_inner(other)
        moved = (self.inputs @ other.inputs.mT).unsqueeze(1) @ other.deltas
        return self.deltas.flatten(2) @ moved.flatten(2).mT

    def kernel_product(self, columns: Tensor) -> Tensor:
        if not self._products_are_cheaper_by_pairs(columns):
            return super().kernel_product(columns)
        return torch.einsum("ijab,jbm->iam", self.inner(self), columns)

    def pull(self, own: Tensor | None, receive: Tensor, send: Tensor) -> tuple[Tensor | None, ...]:
        if not self._products_are_cheaper_by_pairs(send):
            return super().pull(own, receive, send)
        # G'_i = Σ_j G_j pairs_ij, and G_j = Σ_t δ_jt ⊗ u_jt: only inner products of positions are needed.
        batch, directions, positions, _ = self.deltas.shape
        pairs = torch.einsum("iam,jbm->iajb", receive, send)
        if own is not None:
            samples = torch.arange(batch, device=own.device)
            pairs[samples, :, samples] += own.mT
        inputs, deltas = self.inputs.flatten(0, 1), self.deltas.flatten(0, 2)
        by_input = (inputs @ inputs.mT).view(batch, 1, positions, batch, 1, positions)
        by_delta = (deltas @ deltas.mT).view(batch, directions, positions, batch, directions, positions)
        weights = pairs[:, :, None, :, :, None]
        for_deltas = (weights * by_input).flatten(3).flatten(0, 2) @ deltas
        for_inputs = (weights * by_delta).sum((1, 4)).flatten(2).flatten(0, 1) @ inputs
        return for_inputs.view_as(self.inputs), for_deltas.view_as(self.deltas)

    def pull_dense(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        batch, directions, _, rows = self.deltas.shape
        matrices = cotangent.view(batch, directions, rows, self.inputs.shape[2])
        for_inputs = torch.einsum("bdtp,bdpq->btq", self.deltas, matrices)
        return for_inputs, self.inputs.unsqueeze(1) @ matrices.mT

    def _products_are_cheaper_by_pairs(self, columns: Tensor) -> bool:
        """Return whether products with the kernel matrix of all samples are cheaper from pairs of positions."""
        batch, directions, positions, rows = self.deltas.shape
        width = self.inputs.shape[2]
        by_pairs = (batch * positions) ** 2 * (width + directions**2 * rows)
        return by_pairs < batch * directions * rows * width * (positions + columns.shape[2])

    def inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, OuterFactor) or self._pairs_are_cheaper_formed(other):
            return super().inner(other)
        positions, positions_other = self.inputs.shape[1], other.inputs.shape[1]
        left, right = self.deltas.flatten(0, 2), other.deltas.flatten(0, 2)
        deltas = (left @ right.mT).view(*self.deltas.shape[:3], *other.deltas.shape[:3])
        inputs = self.inputs.flatten(0, 1) @ other.inputs.flatten(0, 1).mT
        inputs = inputs.view(len(self.inputs), positions, len(other.inputs), positions_other)
        if positions == positions_other == 1:
            return (deltas[:, :, 0, :, :, 0] * inputs[:, None, 0, :, None, 0]).permute(0, 2, 1, 3)
        return torch.einsum("iosjpt,isjt->ijop", deltas, inputs)

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, OuterFactor):
            return super().trace_inner(other)
        if self._pairs_are_cheaper_formed(other, traced=True):
            return self._trace_of_formed(other)
        if self.inputs.shape[1] == other.inputs.shape[1] == 1:
            deltas = self.deltas.flatten(1) @ other.deltas.flatten(1).mT
            return deltas * (self.inputs[:, 0] @ other.inputs[:, 0].mT)
        products = self.inputs.shape[1] * other.inputs.shape[0] * other.inputs.shape[1]
        at_a_time = max(1, WORKING_BYTES // max(1, products * self.inputs.element_size()))
        traces = []
        for inputs, deltas in zip(*(torch.split(part, at_a_time) for part in self.parts), strict=True):
            by_delta = torch.einsum("iosp,jotp->isjt", deltas, other.deltas)
            by_input = torch.einsum("isq,jtq->isjt", inputs, other.inputs)
            traces.append((by_delta * by_input).sum((1, 3)))
        return torch.cat(traces)

    def _trace_of_formed(self, other: OuterFactor) -> Tensor:
        """Return tr(GᵀG') of each pair from gradients that are formed for some rows of the weight at a time.

        So every sample is formed once, however many there are, in memory that is used again and again.
        """
        numbers = (len(self.inputs) + len(other.inputs)) * self.size[1] * self.inputs.shape[2]
        at_a_time = max(1, pieces_bytes(self.inputs.device) // max(1, numbers * self.inputs.element_size()))
        total = self.inputs.new_zeros(len(self.inputs), len(other.inputs))
        for mine, others in zip(*(torch.split(factor.deltas, at_a_time, 3) for factor in (self, other)), strict=True):
            left = OuterFactor(self.inputs, mine).dense().flatten(1)
            right = left if other is self else OuterFactor(other.inputs, others).dense().flatten(1)
            total += product(left, right)
        return total

    def trace_dot(self, direction: Tensor) -> Tensor:
        moved = torch.unflatten(self.inputs @ direction.flatten(2).flatten(0, 1).mT, 2, (len(direction), -1))
        return (self.deltas.transpose(1, 2) * moved).flatten(1).sum(1)

    def sketch(self, projection: SketchProjection, name: str) -> Tensor:
        blocks = projection.blocks(name)
        if blocks is not None and self._convolution_is_cheaper(projection.widths[name], *blocks):
            return projection.convolve(name, self.inputs, self.deltas)
        return super().sketch(projection, name)

    def _convolution_is_cheaper(self, width: int, row_blocks: int, column_blocks: int) -> bool:
        _, directions, positions, rows = self.deltas.shape
        transforms = positions * row_blocks * column_blocks * (1 + directions) + directions
        convolving = transforms * (_TRANSFORM_COST * width * math.log2(width) + _TRANSFORM_START)
        return convolving < directions * rows * self.inputs.shape[2] * (positions + _FOLDING_COST)

    def pair_cost(self) -> tuple[int, int]:
        formed = self.size[1] * self.shape.numel()
        ghost = self._ghost_cost()
        return (ghost, 0) if ghost <= formed else (formed, self.inputs.shape[1] * formed)

    def _ghost_cost(self) -> int:
        """Return the multiplications for one pair of samples without forming their gradients."""
        positions, columns = self.inputs.shape[1:]
        return positions**2 * (columns + self.size[1] * self.deltas.shape[3])

    def _pairs_are_cheaper_formed(self, other: OuterFactor, traced: bool = False) -> bool:
        """Return whether inner products of all pairs are cheaper from formed gradients, of each direction or of their trace."""
        (batch, directions, positions, rows), columns = self.deltas.shape, self.inputs.shape[2]
        batch_other, directions_other, positions_other, _ = other.deltas.shape
        products = directions if traced else directions * directions_other
        ghost = batch * batch_other * positions * positions_other * (columns + products * (rows + (not traced)))
        form = rows * columns * (batch * directions * positions + batch_other * directions_other * positions_other)
        return ghost > form + batch * batch_other * products * rows * columns

    def weighted_sum(self, weight: Tensor) -> Tensor:
        deltas = torch.einsum("bdtp,bdc->cpbt", self.deltas, weight).flatten(2)
        return (deltas @ self.inputs.flatten(0, 1)).view(-1, *self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        columns = direction.shape[0]
        moved = torch.unflatten(self.inputs @ direction.flatten(2).flatten(0, 1).mT, 2, (columns, -1))
        return torch.einsum("bdtp,btcp->bdc", self.deltas, moved)
