"""The per-sample gradients of one parameter, dense or factored.

For sample i and direction o, a layer that applies its weight at T positions has the gradient Σ_t δ[i,o,t] ⊗ u[i,t], with u
the layer's input and δ the gradient of direction o at the layer's output. A factor keeps (u, δ) and forms the gradient itself
only where that is the cheaper way. Shapes: u (B, T, q), δ (B, d, T, p), weight (p, q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class AbstractFactor(ABC):
    """Per-sample gradients G of one parameter of shape `shape`, for B samples and d directions."""

    shape: torch.Size

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Return (B, d)."""

    @abstractmethod
    def select(self, index: Tensor) -> AbstractFactor:
        """Return the samples `index`, shape (B',)."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> AbstractFactor:
        """Return the factor in `dtype`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradients, shape (B, d, n) with n the number of entries of the parameter."""

    def entries(self) -> Tensor:
        """Return the gradients with their entries in whatever order is cheapest, always the same, shape (B, d, n)."""
        return self.dense()

    def gram(self) -> Tensor:
        """Return GᵀG of each sample, shape (B, d, d)."""
        gradients = self.dense()
        return gradients @ gradients.mT

    def inner(self, other: AbstractFactor) -> Tensor:
        """Return GᵀG' of each pair of samples, shape (B, B', d, d')."""
        left, right = self.dense(), other.dense()
        product = left.flatten(0, 1) @ right.flatten(0, 1).mT
        return product.view(*left.shape[:2], *right.shape[:2]).permute(0, 2, 1, 3)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return Σ_i G_i weight_i for `weight` of shape (B, d, c), shape (c, *shape)."""
        gradients = self.dense().flatten(0, 1)
        return (weight.flatten(0, 1).mT @ gradients).view(-1, *self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        """Return G_iᵀ direction for `direction` of shape (c, *shape), shape (B, d, c)."""
        return self.dense() @ direction.reshape(len(direction), -1).mT

    @abstractmethod
    def mix(self, matrix: Tensor) -> AbstractFactor:
        """Return G_i matrix_i, for `matrix` of shape (B, d, d'): d' new directions."""

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        """Return tr(GᵀG') of each pair of samples with equally many directions, shape (B, B')."""
        return self.dense().flatten(1) @ other.dense().flatten(1).mT

    def trace_dot(self, direction: Tensor) -> Tensor:
        """Return tr(G_iᵀ direction) for `direction` of shape (d, *shape), shape (B,)."""
        return self.dense().flatten(1) @ direction.flatten()

    @property
    @abstractmethod
    def kept_bytes(self) -> int:
        """Return the number of bytes that the factor keeps."""


class DenseFactor(AbstractFactor):
    """Gradients kept as they are: small parameters and whatever had to be formed anyway.

    Args:
        gradients: shape (B, d, *shape).
    """

    def __init__(self, gradients: Tensor) -> None:
        self.shape = gradients.shape[2:]
        self._gradients = gradients.flatten(2) if gradients.ndim > 2 else gradients.unsqueeze(2)

    @property
    def size(self) -> tuple[int, int]:
        return self._gradients.shape[0], self._gradients.shape[1]

    @property
    def kept_bytes(self) -> int:
        return self._gradients.nbytes

    def select(self, index: Tensor) -> DenseFactor:
        return DenseFactor(self._gradients[index].view(-1, self.size[1], *self.shape))

    def to(self, dtype: torch.dtype) -> DenseFactor:
        return DenseFactor(self._gradients.to(dtype).view(*self.size, *self.shape))

    def mix(self, matrix: Tensor) -> DenseFactor:
        mixed = matrix.mT @ self._gradients
        return DenseFactor(mixed.view(*mixed.shape[:2], *self.shape))

    def dense(self) -> Tensor:
        return self._gradients


class OuterFactor(AbstractFactor):
    """Gradients Σ_t δ_t ⊗ u_t of a weight (p, q) that is applied at T positions.

    Args:
        inputs: u, shape (B, T, q).
        deltas: δ, shape (B, d, T, p).
    """

    def __init__(self, inputs: Tensor, deltas: Tensor) -> None:
        self.inputs = inputs
        self.deltas = deltas
        self.shape = torch.Size((deltas.shape[3], inputs.shape[2]))

    @property
    def size(self) -> tuple[int, int]:
        return self.deltas.shape[0], self.deltas.shape[1]

    @property
    def kept_bytes(self) -> int:
        return self.inputs.nbytes + self.deltas.nbytes

    def select(self, index: Tensor) -> OuterFactor:
        return OuterFactor(self.inputs[index], self.deltas[index])

    def to(self, dtype: torch.dtype) -> OuterFactor:
        return OuterFactor(self.inputs.to(dtype), self.deltas.to(dtype))

    def mix(self, matrix: Tensor) -> OuterFactor:
        return OuterFactor(self.inputs, torch.einsum("bdtp,bdc->bctp", self.deltas, matrix))

    def dense(self) -> Tensor:
        if self.inputs.shape[1] == 1:
            return (self.deltas[:, :, 0, :, None] * self.inputs[:, None, 0, None, :]).flatten(2)
        batch, directions, positions, rows = self.deltas.shape
        stacked = self.deltas.transpose(2, 3).reshape(batch, directions * rows, positions)
        return (stacked @ self.inputs).view(batch, directions, rows * self.inputs.shape[2])

    def gram(self) -> Tensor:
        _, directions, positions, rows = self.deltas.shape
        columns = self.inputs.shape[2]
        ghost = positions**2 * (columns + directions * rows) + directions**2 * positions * rows
        formed = directions * rows * columns * (positions + directions)
        if ghost > formed:
            return super().gram()
        moved = (self.inputs @ self.inputs.mT).unsqueeze(1) @ self.deltas
        return moved.flatten(2) @ self.deltas.flatten(2).mT

    def inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, OuterFactor) or self._pair_is_cheaper_formed(other):
            return super().inner(other)
        positions, positions_other = self.inputs.shape[1], other.inputs.shape[1]
        left, right = self.deltas.flatten(0, 2), other.deltas.flatten(0, 2)
        deltas = (left @ right.mT).view(*self.deltas.shape[:3], *other.deltas.shape[:3])
        inputs = (self.inputs.flatten(0, 1) @ other.inputs.flatten(0, 1).mT).view(
            -1, positions, len(other.inputs), positions_other
        )
        if positions == positions_other == 1:
            return (deltas[:, :, 0, :, :, 0] * inputs[:, None, 0, :, None, 0]).permute(0, 2, 1, 3)
        return torch.einsum("iosjpt,isjt->ijop", deltas, inputs)

    def trace_inner(self, other: AbstractFactor) -> Tensor:
        if not isinstance(other, OuterFactor) or self._pair_is_cheaper_formed(other):
            return super().trace_inner(other)
        if self.inputs.shape[1] == other.inputs.shape[1] == 1:
            deltas = self.deltas.flatten(1) @ other.deltas.flatten(1).mT
            return deltas * (self.inputs[:, 0] @ other.inputs[:, 0].mT)
        deltas = torch.einsum("iosp,jotp->isjt", self.deltas, other.deltas)
        inputs = torch.einsum("isq,jtq->isjt", self.inputs, other.inputs)
        return (deltas * inputs).sum((1, 3))

    def trace_dot(self, direction: Tensor) -> Tensor:
        moved = torch.unflatten(self.inputs @ direction.flatten(0, 1).mT, 2, (len(direction), -1))
        return (self.deltas.transpose(1, 2) * moved).flatten(1).sum(1)

    def _pair_is_cheaper_formed(self, other: OuterFactor) -> bool:
        (batch, directions, positions, rows), columns = self.deltas.shape, self.inputs.shape[2]
        batch_other, directions_other, positions_other, _ = other.deltas.shape
        ghost = batch * batch_other * positions * positions_other * (columns + directions * directions_other * (rows + 1))
        form = rows * columns * (batch * directions * positions + batch_other * directions_other * positions_other)
        return ghost > form + batch * batch_other * directions * directions_other * rows * columns

    def weighted_sum(self, weight: Tensor) -> Tensor:
        deltas = torch.einsum("bdtp,bdc->cpbt", self.deltas, weight).flatten(2)
        return deltas @ self.inputs.flatten(0, 1)

    def dot(self, direction: Tensor) -> Tensor:
        columns = direction.shape[0]
        moved = torch.unflatten(self.inputs @ direction.flatten(0, 1).mT, 2, (columns, -1))
        return torch.einsum("bdtp,btcp->bdc", self.deltas, moved)


class EmbeddingFactor(AbstractFactor):
    """Gradients of a table (V, p) of which each sample looks up T rows: δ_t in row index_t, never the whole table.

    Args:
        index: shape (B, T), int64; -1 where a position gives no gradient (padding).
        deltas: δ, shape (B, d, T, p).
        num_rows: V.
    """

    def __init__(self, index: Tensor, deltas: Tensor, num_rows: int) -> None:
        self.index = index
        self.deltas = deltas * (index >= 0)[:, None, :, None]
        self.shape = torch.Size((num_rows, deltas.shape[3]))

    @property
    def size(self) -> tuple[int, int]:
        return self.deltas.shape[0], self.deltas.shape[1]

    @property
    def kept_bytes(self) -> int:
        return self.index.nbytes + self.deltas.nbytes

    def select(self, index: Tensor) -> EmbeddingFactor:
        return EmbeddingFactor(self.index[index], self.deltas[index], self.shape[0])

    def to(self, dtype: torch.dtype) -> EmbeddingFactor:
        return EmbeddingFactor(self.index, self.deltas.to(dtype), self.shape[0])

    def mix(self, matrix: Tensor) -> EmbeddingFactor:
        return EmbeddingFactor(self.index, torch.einsum("bdtp,bdc->bctp", self.deltas, matrix), self.shape[0])

    def dense(self) -> Tensor:
        batch, directions, _, columns = self.deltas.shape
        gradients = self.deltas.new_zeros(batch, directions, self.shape[0], columns)
        where = self.index.clamp_min(0)[:, None, :, None].expand_as(self.deltas)
        return gradients.scatter_add(2, where, self.deltas).flatten(2)

    def gram(self) -> Tensor:
        return torch.einsum("boti,bpsi,bts->bop", self.deltas, self.deltas, self._matches(self.index, self.index, pairs=False))

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


def sum_of_calls(factors: list[AbstractFactor]) -> AbstractFactor:
    """Return the gradients of a parameter that several calls of its layer use: their sum."""
    if len(factors) == 1:
        return factors[0]
    if all(isinstance(factor, OuterFactor) for factor in factors):
        outer = [factor for factor in factors if isinstance(factor, OuterFactor)]
        return OuterFactor(torch.cat([f.inputs for f in outer], 1), torch.cat([f.deltas for f in outer], 2))
    if all(isinstance(factor, EmbeddingFactor) for factor in factors):
        tables = [factor for factor in factors if isinstance(factor, EmbeddingFactor)]
        index, deltas = torch.cat([f.index for f in tables], 1), torch.cat([f.deltas for f in tables], 2)
        return EmbeddingFactor(index, deltas, factors[0].shape[0])
    total = sum((factor.dense() for factor in factors[1:]), factors[0].dense())
    return DenseFactor(total.view(*factors[0].size, *factors[0].shape))
