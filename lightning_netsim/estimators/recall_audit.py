"""Measure how right a neighbor table is, on a few queries whose exact rows are computed."""

from __future__ import annotations

import torch
from torch import Tensor

# Reference samples this close to the k-th are as good as it.
_TIE = 1e-6


class RecallAudit:
    """Keep the exact similarities of a few queries to the whole reference set, and measure the recall of a table by them.

    recall@k is the share of listed neighbors whose exact similarity is at least that of the true k-th.

    Args:
        exclude: shape (A,), the ids of the audited samples where they are in the reference set themselves, else -1.

    Attributes:
        num_queries: A.
    """

    def __init__(self, exclude: Tensor) -> None:
        self.num_queries = len(exclude)
        self._exclude = exclude
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []

    def offer(self, similarity: Tensor, ids: Tensor) -> None:
        """Take in the exact similarities, shape (A, n), to the reference samples `ids`, shape (n,)."""
        self._rows.append(similarity.cpu())
        self._ids.append(ids)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the exact similarities, shape (A, N), and the ids of the reference samples, shape (N,), ascending."""
        ids, order = torch.cat(self._ids).sort()
        return torch.cat(self._rows, 1)[:, order], ids

    def hits(self, index: Tensor) -> Tensor:
        """Return which of the neighbors `index`, shape (A, k), are among the true k, shape (A, k), bool."""
        if not self.num_queries:
            return torch.zeros(0, index.shape[1], dtype=torch.bool)
        if not self.num_queries:
            return torch.zeros(0, index.shape[1], dtype=torch.bool)
        similarity, ids = self.rows()
        listed = self._listed(index)
        others = similarity.masked_fill((ids == self._exclude[:, None]) | similarity.isnan(), -torch.inf)
        kth = others.topk(min(index.shape[1], others.shape[1]), dim=1).values[:, -1:]
        # Where fewer than k can be found, what is missing is no miss.
        return (listed >= kth - _TIE) | ((index < 0) & (kth == -torch.inf))

    def squared_errors(self, index: Tensor, similarity: Tensor) -> Tensor:
        """Return the squared errors of the listed similarities, shape (number listed,)."""
        if not self.num_queries:
            return torch.zeros(0)
        return (self._listed(index) - similarity)[index >= 0].square()

    def _listed(self, index: Tensor) -> Tensor:
        """Return the exact similarities of the listed neighbors, shape (A, k); -inf where none is listed."""
        similarity, ids = self.rows()
        columns = torch.searchsorted(ids, index.clamp_min(0)).clamp_max(len(ids) - 1)
        return similarity.gather(1, columns).masked_fill(index < 0, -torch.inf)
