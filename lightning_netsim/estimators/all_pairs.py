"""Hard counts, power counts and exact neighbors, from all pairs, tile by tile."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_netsim._checks import check_numbers
from lightning_netsim.estimators.neighbor_table import NeighborTable
from lightning_netsim.results import KernelNeighborsResult

# Listed beyond k, so that ties across the k-th place are seen.
_SLACK = 4
# Similarities of duplicates differ by this much at most, by the order of summation in float32.
_TIE = 5e-7


class AllPairs:
    """Count and rank what every query is compared with, without an N×N matrix: memory is Q·(k + thresholds + powers) numbers.

    Hard counts are #{j : k(x_i, x_j) ≥ τ}, power counts Σ_j max(k(x_i, x_j), 0)^α, over all samples that were offered. Offer
    each pair once; of a set compared with itself only the tiles on and above the diagonal need to be formed: `offer` takes the
    transpose of a tile for the rows below.

    Args:
        num_queries: Q.
        k: the number of neighbors.
        thresholds: τ of the hard counts, in [-1, 1].
        powers: α of the power counts, above 0.
        device: where the tables are kept, best that of the tiles.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 4.

    Example:
        >>> pairs = AllPairs(num_queries=2, k=1, thresholds=[0.5])
        >>> pairs.offer(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), ids=torch.arange(2), exclude=torch.arange(2))
        >>> pairs.neighbors().index.flatten().tolist(), pairs.hard[0.5].tolist()
        ([1, 0], [2.0, 2.0])
    """

    def __init__(
        self,
        num_queries: int,
        k: int,
        thresholds: Iterable[float] = (),
        powers: Iterable[float] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.k = k
        self._table = NeighborTable(num_queries, k + _SLACK, device)
        zeros = torch.zeros(num_queries, device=device)
        self.hard = {tau: zeros.clone() for tau in check_numbers("thresholds", thresholds, -1.0, 1.0)}
        self.power = {alpha: zeros.clone() for alpha in check_numbers("powers", powers, 1e-6)}

    def offer(self, similarity: Tensor, ids: Tensor, rows: Tensor | None = None, exclude: Tensor | None = None) -> None:
        """Take in a tile of similarities.

        Args:
            similarity: shape (q, n), finite.
            ids: shape (n,), int64, of the reference samples.
            rows: shape (q,), int64, which queries these are; by default all.
            exclude: shape (q,), int64, their own ids, which are counted but not listed as neighbors.
        """
        self._table.offer(similarity, ids, rows, exclude)
        where = slice(None) if rows is None else rows
        for tau, count in self.hard.items():
            count[where] += (similarity >= tau).sum(1)
        for alpha, count in self.power.items():
            count[where] += similarity.clamp_min(0).pow(alpha).sum(1)

    def neighbors(self) -> KernelNeighborsResult:
        """Return the k nearest of all that was offered; similarities equal up to rounding are in the order of their ids."""
        found = self._table.result(recall=1.0)
        return settle_ties(found, self.k)


def settle_ties(found: KernelNeighborsResult, k: int) -> KernelNeighborsResult:
    """Return the first k of a table with neighbors that differ by rounding only in the order of their ids.

    Args:
        found: a table of at least k columns, descending.
        k: the columns to keep.
    """
    similarity, index = found.similarity, found.index
    filled = similarity.nan_to_num(nan=-torch.inf)
    apart = (filled[:, :-1] - filled[:, 1:]).nan_to_num(nan=torch.inf) > _TIE
    group = torch.nn.functional.pad(apart.cumsum(1), (1, 0))
    # Missing entries, of index -1, stay behind.
    by_id = index.masked_fill(index < 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    order = by_id.gather(1, group.gather(1, by_id).argsort(dim=1, stable=True))
    settled = similarity.gather(1, order).nan_to_num(nan=-torch.inf).sort(dim=1, descending=True).values
    settled = settled.masked_fill(settled == -torch.inf, torch.nan)
    return KernelNeighborsResult(settled[:, :k], index.gather(1, order)[:, :k], found.recall)
