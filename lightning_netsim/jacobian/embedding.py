"""The per-sample gradients of an embedding table: of the rows that a sample looks up, never of the whole table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_netsim.jacobian.factors import AbstractFactor
from lightning_netsim.jacobian.sketch import SketchProjection


class EmbeddingFactor(AbstractFactor):
    """Gradients of a table (V, p) of which each sample looks up T rows: δ_t in row index_t, never the whole table.

    Args:
        index: shape (B, T), int64; -1 where a position gives no gradient (padding).
        deltas: δ, shape (B, d, T, p), zero where the index is -1.
        num_rows: V.
    """

    def __init__(self, index: Tensor, deltas: Tensor, num_rows: int) -> None:
        self.index = index
        self.deltas = deltas
        self.shape = torch.Size((num_rows, deltas.shape[3]))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.index, self.deltas

    def with_parts(self, parts: Sequence[Tensor]) -> EmbeddingFactor:
        index, deltas = parts
        return EmbeddingFactor(index, deltas, self.shape[0])

    def joined(self, others: Sequence[AbstractFactor]) -> AbstractFactor:
        index = [factor.parts[0] for factor in (self, *others)]
        deltas = [factor.parts[1] for factor in (self, *others)]
        return self.with_parts([torch.cat(index, 1), torch.cat(deltas, 2)])

    def mix(self, matrix: Tensor) -> EmbeddingFactor:
        return self.with_parts([self.index, torch.einsum("bdtp,bdc->bctp", self.deltas, matrix)])

    def dense(self) -> Tensor:
        batch, directions, _, columns = self.deltas.shape
        gradients = self.deltas.new_zeros(batch, directions, self.shape[0], columns)
        where = self.index.clamp_min(0)[:, None, :, None].expand_as(self.deltas)
        return gradients.scatter_add(2, where, self.deltas).flatten(2)

    def row_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, EmbeddingFactor):
            return super().row_inner(other)
        return torch.einsum(
            "boti,bpsi,bts->bop", self.deltas, other.deltas, self._matches(self.index, other.index, pairs=False)
        )

    def inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, EmbeddingFactor):
            return super().inner(other)
        left, right = self.deltas.flatten(0, 2), other.deltas.flatten(0, 2)
        deltas = (left @ right.mT).view(*self.deltas.shape[:3], *other.deltas.shape[:3])
        return torch.einsum("iosjpt,isjt->ijop", deltas, self._matches(self.index, other.index, pairs=True))

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, EmbeddingFactor):
            return super().trace_inner(other)
        deltas = torch.einsum("iosp,jotp->isjt", self.deltas, other.deltas)
        return (deltas * self._matches(self.index, other.index, pairs=True)).sum((1, 3))

    def trace_dot(self, direction: Tensor) -> Tensor:
        return torch.einsum("bdtp,dbtp->b", self.deltas, direction[:, self.index.clamp_min(0)])

    def sketch(self, projection: SketchProjection, name: str) -> Tensor:
        return projection.scatter(name, self.index.clamp_min(0), self.deltas)

    def pair_cost(self) -> tuple[int, int]:
        positions = self.index.shape[1]
        return positions**2 * self.size[1] * self.deltas.shape[3], 0

    def weighted_sum(self, weight: Tensor) -> Tensor:
        deltas = torch.einsum("bdtp,bdc->btcp", self.deltas, weight).flatten(0, 1)
        total = deltas.new_zeros(self.shape[0], *deltas.shape[1:])
        return total.index_add(0, self.index.clamp_min(0).flatten(), deltas).transpose(0, 1)

    def dot(self, direction: Tensor) -> Tensor:
        looked_up = direction[:, self.index.clamp_min(0)]
        return torch.einsum("bdtp,cbtp->bdc", self.deltas, looked_up)

    def _matches(self, index: Tensor, other: Tensor, pairs: bool) -> Tensor:
        same = index[:, :, None, None] == other if pairs else index[:, :, None] == other[:, None, :]
        return same.to(self.deltas.dtype)
