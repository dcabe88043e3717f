"""Measure how right a sketched neighbor table is, on a few queries whose exact rows are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_netsim.features import AbstractFeatureBatch

# Reference samples this close to the k-th are as good as it.
_TIE = 1e-6


class RecallAudit:
    """Compute the exact similarities of a few queries to the whole reference set, and the recall of a table against them.

    recall@k is the share of listed neighbors whose exact similarity is at least that of the true k-th.

    Args:
        queries: exact (factored) features of the audited samples, A in all, in one batch or several.
        exclude: shape (A,), their own ids where they are in the reference set, else -1.
    """

    def __init__(self, queries: Sequence[AbstractFeatureBatch], exclude: Tensor) -> None:
        self._queries = queries
        self._exclude = exclude
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []

    def update(self, reference: AbstractFeatureBatch, ids: Tensor) -> None:
        """Add a batch of the reference set, with its ids, shape (B,)."""
        self._rows.append(torch.cat([queries.inner(reference) for queries in self._queries]).cpu())
        self._ids.append(ids)

    def recall(self, index: Tensor) -> float:
        """Return recall@k of the neighbors `index`, shape (A, k), in [0, 1]."""
        similarity, listed = self._exact(index)
        own = torch.cat(self._ids) == self._exclude[:, None]
        others = similarity.masked_fill(own | similarity.isnan(), -torch.inf)
        kth = others.topk(index.shape[1], dim=1).values[:, -1:]
        return float((listed >= kth - _TIE).float().mean())

    def similarity_error(self, index: Tensor, similarity: Tensor) -> float:
        """Return the root mean square error of the listed similarities, shape (A, k)."""
        found = index >= 0
        return float((self._exact(index)[1] - similarity)[found].square().mean().sqrt())

    def _exact(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact rows, shape (A, N), and their entries at the listed neighbors, shape (A, k)."""
        rows, ids = torch.cat(self._rows, 1), torch.cat(self._ids)
        order = ids.argsort()
        columns = order[torch.searchsorted(ids[order], index)]
        # An approximate index may find fewer than k: what is missing is no neighbor.
        return rows, rows.gather(1, columns).masked_fill(index < 0, -torch.inf)
