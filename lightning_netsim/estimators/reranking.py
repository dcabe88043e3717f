"""Put the candidates that a sketch found into the order of their exact similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim.estimators.all_pairs import settle_ties
from lightning_netsim.results import KernelNeighborsResult

# Candidates are compared while their sketch comes within this many standard errors of the k-th.
_ERRORS = 3.0
# Candidates that are fetched for each query.
_FETCHED_FACTOR, _FETCHED_LEAST = 16, 160


def shortlist_size(k: int, num_reference: int) -> int:
    """Return F, how many candidates to fetch from the sketch for k neighbors."""
    return min(num_reference, max(_FETCHED_FACTOR * k, _FETCHED_LEAST))


class Reranking:
    """Choose which candidates of a shortlist to compare exactly, and rank those.

    With sketched similarity s and exact similarity k, k − s has about the standard deviation σ = c (1 − s²), where c is a
    property of the sketch. First the best 2k of every query are compared; then those that could still be among the k, with
    s + 3σ at least the k-th so far. What is left out is left out by the sketch's own error, not by a fixed number; an audit
    measures what that misses.

    Args:
        shortlist: F candidates of each query with their sketched similarities, best first.
        k: the number of neighbors.
        error: c.
    """

    def __init__(self, shortlist: KernelNeighborsResult, k: int, error: float) -> None:
        self.k = k
        self._ids = shortlist.index
        self._sketched = shortlist.similarity
        self._margin = _ERRORS * error * (1 - shortlist.similarity.square()).clamp_min(0)
        self._exact = torch.full_like(shortlist.similarity, torch.nan)

    def first(self) -> Tensor:
        """Return the candidates to compare at first, shape (Q, F), bool."""
        chosen = self._ids >= 0
        chosen[:, 2 * self.k :] = False
        return chosen

    def rest(self) -> Tensor:
        """Return the further candidates that may be among the k, shape (Q, F), bool, by what is known so far."""
        lowest = torch.where(self._exact.isnan(), self._sketched - self._margin, self._exact)
        kth = lowest.nan_to_num(nan=-torch.inf).topk(min(self.k, lowest.shape[1]), dim=1).values[:, -1:]
        return (self._sketched + self._margin >= kth) & self._exact.isnan() & (self._ids >= 0)

    def candidates(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries with a chosen candidate, and where in the shortlist their candidates stand.

        Args:
            chosen: shape (Q, F), bool.

        Returns:
            queries, shape (q,); columns of the shortlist, shape (q, R); the ids there, -1 where a query has fewer than R.
        """
        rows = chosen.any(1).nonzero().squeeze(1)
        width = int(chosen.sum(1).max()) if len(rows) else 0
        columns = chosen[rows].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        return rows, columns, self._ids[rows].gather(1, columns).masked_fill(~chosen[rows].gather(1, columns), -1)

    def take(self, rows: Tensor, columns: Tensor, similarity: Tensor) -> None:
        """Take in exact similarities, shape (q, R), of the candidates in `columns` of the queries `rows`; NaN where unknown."""
        known = self._exact[rows]
        values = torch.where(similarity.isnan(), known.gather(1, columns), similarity.to(known))
        self._exact[rows] = known.scatter(1, columns, values)

    def neighbors(self, recall: float | None = None) -> KernelNeighborsResult:
        """Return the k best of the candidates that were compared."""
        exact = self._exact.nan_to_num(nan=-torch.inf)
        by_id = self._ids.argsort(dim=1)
        order = by_id.gather(1, exact.gather(1, by_id).sort(dim=1, descending=True, stable=True).indices)
        similarity = exact.gather(1, order)
        missing = similarity == -torch.inf
        index = self._ids.gather(1, order).masked_fill(missing, -1)
        return settle_ties(KernelNeighborsResult(similarity.masked_fill(missing, torch.nan), index, recall), self.k)
