"""Keep the best neighbors, and the counts, of every query while similarities come by in any order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_netsim._checks import check_numbers, check_positive_int, check_tensor, expected
from lightning_netsim.functional.results import KernelNeighborsResult

_NOBODY = torch.iinfo(torch.int64).max
# Listed beyond k, so that ties across the k-th place are seen.
_SLACK = 4
# Similarities of duplicates differ by this much at most, by the order of summation in float32.
_TIE = 5e-7


class NeighborTable:
    """Hold the k reference samples of highest similarity for each of Q queries, of all that were offered so far.

    Offer tiles of the matrix of similarities as they are formed, each pair once; memory is Q·k numbers, whatever N. The table
    depends on neither the tiles nor their order: it holds the first k in the order (similarity descending, id ascending), also
    among equal similarities at the k-th place. Similarities are compared in float32. NaN and -inf are never listed.

    Args:
        num_queries: Q, at least 1.
        k: the number of neighbors, at least 1.
        device: where the table is kept, best that of the tiles.

    Raises:
        NetsimError: `num_queries` or `k` is not a positive int.

    Example:
        >>> table = NeighborTable(num_queries=1, k=2)
        >>> table.offer(torch.tensor([[0.1, 0.9]]), ids=torch.tensor([0, 1]))
        >>> table.offer(torch.tensor([[0.9, torch.nan, 0.3]]), ids=torch.tensor([2, 3, 4]))
        >>> table.result().index.tolist()
        [[1, 2]]
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str = "cpu") -> None:
        check_positive_int("num_queries", num_queries)
        self.k = check_positive_int("k", k)
        self._similarity = torch.full((num_queries, k), -torch.inf, device=device)
        self._ids = torch.full((num_queries, k), -1, device=device)

    @torch.no_grad()
    def offer(self, similarity: Tensor, ids: Tensor, rows: Tensor | None = None, exclude: Tensor | None = None) -> None:
        """Offer the similarities of q queries to n reference samples.

        Args:
            similarity: shape (q, n), floating-point.
            ids: shape (n,), or (q, n) where each query meets samples of its own; int64, at least 0.
            rows: shape (q,), int64: which queries these are, each at most once; by default all of them, in order.
            exclude: shape (q,), int64: for each of these queries the id that is not to be listed, its own.

        Raises:
            NetsimError: a shape does not fit.
        """
        device = self._ids.device
        tile = check_tensor("similarity", similarity, 2, like="(q, n)").to(device, torch.float32)
        ids, rows = ids.to(device), None if rows is None else rows.to(device)
        number, width = tile.shape
        num_rows = len(self._ids) if rows is None else len(rows)
        if number != num_rows:
            raise expected("similarity", f"of shape ({num_rows}, n), one row for each query", f"shape {tuple(tile.shape)}")
        if ids.shape not in ((width,), (number, width)) or ids.is_floating_point():
            wanted = f"an int64 tensor of shape ({width},) or ({number}, {width})"
            raise expected("ids", wanted, f"{ids.dtype} of shape {tuple(ids.shape)}")
        if exclude is not None and exclude.shape != (number,):
            raise expected("exclude", f"of shape ({number},)", f"shape {tuple(exclude.shape)}")
        if not tile.numel():
            return
        tile = tile.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # After a few tiles, most of them hold nothing new for most queries.
        best, kth = tile.amax(1), self.kth() if rows is None else self.kth()[rows]
        open_rows = ((best >= kth) & (best > -torch.inf)).nonzero().squeeze(1)
        if not len(open_rows):
            return
        tile, ids = tile[open_rows], ids[open_rows] if ids.ndim == 2 else ids.expand(len(open_rows), -1)
        if exclude is not None:
            tile = tile.masked_fill_(ids == exclude.to(device)[open_rows].unsqueeze(1), -torch.inf)
        rows = open_rows if rows is None else rows[open_rows]
        best, found = _first(tile, ids, self.k)
        similarity, ids = torch.cat([self._similarity[rows], best], 1), torch.cat([self._ids[rows], found], 1)
        self._similarity[rows], self._ids[rows] = in_order(similarity, ids, self.k)

    def kth(self) -> Tensor:
        """Return the smallest listed similarity of each query, shape (Q,); -inf while fewer than k are listed."""
        return self._similarity[:, -1]

    def result(self, recall: float | None = None) -> KernelNeighborsResult:
        """Return the table on the CPU; -1 and NaN where fewer than k were found.

        Args:
            recall: 1.0 where every similarity was exact and every pair was offered, else what an audit measured.
        """
        similarity = self._similarity.cpu()
        missing = similarity == -torch.inf
        return KernelNeighborsResult(
            similarity.masked_fill(missing, torch.nan), self._ids.cpu().masked_fill(missing, -1), recall
        )


def in_order(similarity: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k of each row, or all if there are fewer, by similarity (descending) and then by id (ascending)."""
    by_id = ids.argsort(dim=1)
    order = similarity.gather(1, by_id).sort(dim=1, descending=True, stable=True).indices
    order = by_id.gather(1, order)[:, :k]
    return similarity.gather(1, order), ids.gather(1, order)


def _first(tile: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k of each row, or all if there are fewer, by similarity and, at the k-th place, by id."""
    top, position = tile.topk(min(k + 1, tile.shape[1]), dim=1)
    found = ids.gather(1, position)
    if tile.shape[1] <= k:
        return top, found
    # `topk` takes any of the samples that share the k-th place: where there are more than fit, take the lowest ids.
    tied = ((top[:, k] == top[:, k - 1]) & (top[:, k] > -torch.inf)).nonzero().squeeze(1)
    top, found = top[:, :k], found[:, :k]
    if len(tied):
        edge = top[tied, -1:]
        lowest = torch.where(tile[tied] == edge, ids[tied], _NOBODY).topk(k, dim=1, largest=False).values
        above = (top[tied] > edge).sum(1, keepdim=True)
        place = (torch.arange(k, device=tile.device) - above).clamp_min(0)
        found[tied] = torch.where(top[tied] == edge, lowest.gather(1, place), found[tied])
    return top, found


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
        return settle_ties(self._table.result(recall=1.0), self.k)


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
    by_id = index.masked_fill(index < 0, _NOBODY).argsort(dim=1, stable=True)
    order = by_id.gather(1, group.gather(1, by_id).argsort(dim=1, stable=True))
    settled = similarity.gather(1, order).nan_to_num(nan=-torch.inf).sort(dim=1, descending=True).values
    settled = settled.masked_fill(settled == -torch.inf, torch.nan)
    return KernelNeighborsResult(settled[:, :k], index.gather(1, order)[:, :k], found.recall)
