"""The per-sample gradients of a weight that is applied at T positions, as in a linear layer.

For sample i and direction o the gradient is Σ_t δ[i,o,t] ⊗ u[i,t], with u the layer's input and δ the gradient of direction o
at the layer's output. (u, δ) is kept, and the gradient itself is formed only where that is the cheaper way. Shapes: u
(B, T, q), δ (B, d, T, p), weight (p, q).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_netsim.jacobian.factors import WORKING_BYTES, AbstractFactor, pieces_bytes, product
from lightning_netsim.jacobian.sketch import SketchProjection

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
        parts = zip(*(torch.split(part, at_a_time) for part in self.parts), strict=True)
        return torch.cat([_trace_of_positions(inputs, deltas, other) for inputs, deltas in parts])

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


def _trace_of_positions(inputs: Tensor, deltas: Tensor, other: OuterFactor) -> Tensor:
    """Return tr(GᵀG') of each pair from the inner products of all positions."""
    by_delta = torch.einsum("iosp,jotp->isjt", deltas, other.deltas)
    by_input = torch.einsum("isq,jtq->isjt", inputs, other.inputs)
    return (by_delta * by_input).sum((1, 3))
