"""Rank the candidates that a sketch finds by their exact similarities, and measure what the sketch missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators import KernelNeighbors
from lightning_netsim.estimators.neighbor_table import settle_ties
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.measurement.plan import TILE
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.ranking import Ranked, exchanged
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.swept_set import Block, FeatureStore
from lightning_netsim.measurement.tiles import tiles

# Candidates are compared while their sketch comes within this many standard errors of the k-th.
_ERRORS = 3.0
# Candidates that are fetched for each query.
_FETCHED_FACTOR, _FETCHED_LEAST = 16, 160
# faiss multiplies large matrices several times as fast as small ones.
_SEARCHED_AT_A_TIME = 2048
# Queries and candidates of which all pairs are compared at a time; more where one query has that many.
_TILED_SAMPLES = 256
# Reference samples this close to the k-th are as good as it.
_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Sketches:
    """The sketches that candidates are searched by.

    Attributes:
        ids: shape (V,), the valid queries of this process.
        own: theirs, shape (V, K).
        reference: those of all reference samples, block by block, with their ids.
        same: whether the queries are reference samples themselves.
    """

    ids: Tensor
    own: Tensor
    reference: list[tuple[Tensor, Tensor]]
    same: bool


def rank_candidates(
    sketches: Sketches,
    audited: FeatureStore,
    compare: Callable[[Reranking, RecallAudit], None],
    settings: SweepSettings,
    processes: Processes,
    progress: Progress,
) -> Ranked:
    """Search candidates by their sketches, compare them exactly, and audit what that gives.

    Args:
        sketches: of the queries of this process, and of all reference samples.
        audited: the exact features of some of its queries.
        compare: gives the exact similarities of the candidates to the reranking, and the exact rows of the audited queries to
            the audit.
        settings: k, index, thresholds and powers.
        processes: those that share the sets.
        progress: told the number of queries that were searched for.
    """
    is_audited = torch.isin(sketches.ids, audited.ids)
    errors = processes.concatenate(sketch_error(audited, sketches.own[is_audited.to(sketches.own.device)]))
    error = float(errors.square().mean().sqrt()) if len(errors) else 0.0
    reranking = Reranking(_search(sketches, settings, progress), settings.k, error)
    audit = RecallAudit(audited.ids if sketches.same else torch.full_like(audited.ids, -1))
    compare(reranking, audit)
    neighbors = reranking.neighbors()
    listed = neighbors.index[is_audited]
    return Ranked(
        sketches.ids,
        neighbors,
        *estimate_counts(audit, sketches, is_audited, settings, processes),
        audit.hits(listed),
        audit.squared_errors(listed, neighbors.similarity[is_audited]),
    )


def compare_stored(
    queries: FeatureStore,
    reference: FeatureStore,
    audited: FeatureStore,
    processes: Processes,
    device: torch.device,
    reranking: Reranking,
    audit: RecallAudit,
) -> None:
    """Compare candidates whose exact features are all in memory: first the nearest by their sketches, then what may be near."""
    same, rows = queries is reference, torch.arange(len(queries))
    for choose in (reranking.first, reranking.rest):
        chosen = choose()
        # In one block, every sample is formed as seldom as can be.
        whole = [] if reference.features is None else [(reference.features, reference.ids)]
        for block in whole if processes.alone else exchanged(reference.blocks(TILE), processes, device):
            compare_candidates(reranking, chosen, queries, rows, block, same=same and processes.alone)
    audit_with(audit, audited, exchanged(reference.blocks(TILE), processes, device))


def _search(sketches: Sketches, settings: SweepSettings, progress: Progress) -> KernelNeighborsResult:
    """Return the shortlists of all own queries."""
    others = sum(len(ids) for _, ids in sketches.reference) - sketches.same
    if others <= 0:
        nobody = torch.full((len(sketches.ids), 1), -1)
        return KernelNeighborsResult(nobody.float().fill_(torch.nan), nobody)
    neighbors = KernelNeighbors(shortlist_size(settings.k, others), settings.index_factory, settle_ties=False)
    for vectors, ids in sketches.reference:
        neighbors.update(DenseFeatureBatch(vectors, normalize=False), ids)
    number = len(sketches.own)
    for start in range(0, number, _SEARCHED_AT_A_TIME):
        part = slice(start, start + _SEARCHED_AT_A_TIME)
        queries = DenseFeatureBatch(sketches.own[part], normalize=False)
        neighbors.query(queries, sketches.ids[part] if sketches.same else None)
        progress("search", min(part.stop, number), number)
    return neighbors.compute()


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


def compare_candidates(
    reranking: Reranking, chosen: Tensor, queries: FeatureStore, rows: Tensor, block: Block, same: bool = False
) -> None:
    """Take the exact similarities of queries and those of their chosen candidates that are in a block.

    Args:
        reranking: takes the similarities.
        chosen: shape (Q, F), bool, the candidates of all queries that are wanted.
        queries: some of the queries.
        rows: shape (n,), the rows that these have in `reranking`.
        block: reference samples.
        same: whether the block is the queries themselves, which are then often candidates of each other: each such pair is
            compared once.
    """
    features, ids = block
    every = queries.features
    if every is None:
        return
    place = torch.full((len(chosen),), -1)
    place[rows] = torch.arange(len(rows))
    found, columns, wanted = reranking.candidates(chosen & (place >= 0).unsqueeze(1))
    listed = _positions(ids, wanted)
    some = (listed >= 0).any(1)
    if not bool(some.any()):
        return
    found, columns, listed = found[some], columns[some], listed[some]
    asked = _once(place[found], listed) if same else listed
    similarity = torch.full(listed.shape, torch.nan)
    most = max(_TILED_SAMPLES, 2 * asked.shape[1])
    for tile_rows, samples in tiles(asked, most):
        tile = every.trace_tile(place[found[tile_rows]], features, samples).cpu()
        part = asked[tile_rows]
        where = torch.searchsorted(samples, part.clamp_min(0)).clamp_max(len(samples) - 1)
        similarity[tile_rows] = tile.gather(1, where).masked_fill(part < 0, torch.nan)
    if same:
        _fill_mirrored(similarity, place[found], listed, asked)
    reranking.take(found, columns, similarity)


def _once(rows: Tensor, listed: Tensor) -> Tensor:
    """Return lists of samples of one set without the second of each pair that is listed both ways: -1 in its place.

    Args:
        rows: shape (q,), which samples the lists belong to.
        listed: shape (q, R); -1 where there is none.
    """
    forth, back = _pairs(rows, listed)
    return listed.masked_fill((listed < rows.unsqueeze(1)) & torch.isin(back, forth[listed >= 0]), -1)


def _fill_mirrored(similarity: Tensor, rows: Tensor, listed: Tensor, asked: Tensor) -> None:
    """Fill in the similarities, shape (q, R), of the pairs that `_once` has taken out of `listed`."""
    forth, back = _pairs(rows, listed)
    known, missing = asked >= 0, (asked < 0) & (listed >= 0)
    pairs, order = forth[known].sort()
    similarity[missing] = similarity[known][order][torch.searchsorted(pairs, back[missing])]


def _pairs(rows: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return a number for each listed pair (row, sample), and the number of the pair (sample, row), shape (q, R)."""
    size = int(torch.maximum(rows.max(), listed.max())) + 1
    return rows.unsqueeze(1) * size + listed, listed * size + rows.unsqueeze(1)


def _positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Return where in `ids` each wanted id stands, -1 where it does not."""
    if not len(ids):
        return torch.full_like(wanted, -1)
    ordered, order = ids.sort()
    place = torch.searchsorted(ordered, wanted.clamp_min(0)).clamp_max(len(ids) - 1)
    return torch.where((ordered[place] == wanted) & (wanted >= 0), order[place], -1)


def audit_with(audit: RecallAudit, audited: FeatureStore, blocks: Iterable[Block]) -> None:
    """Compute the exact rows of the audited queries, block by block of the reference set."""
    for features, ids in blocks:
        every = audited.features
        if every is not None:
            audit.offer(every.trace_inner(features), ids)


def sketch_error(audited: FeatureStore, sketches: Tensor) -> Tensor:
    """Return (k − s)/(1 − s²) of all pairs of audited samples: the error of a sketch, of a size that hardly depends on k.

    Args:
        audited: their exact features.
        sketches: their sketches, unit vectors, shape (A, K).
    """
    features = audited.features
    if features is None:
        return torch.zeros(0)
    exact, sketched = features.trace_inner(features), sketches @ sketches.mT
    above = torch.ones_like(exact, dtype=torch.bool).triu(1)
    return ((exact - sketched) / (1 - sketched.square()).clamp_min(1e-6))[above].cpu()


def estimate_counts(
    audit: RecallAudit, sketches: Sketches, is_audited: Tensor, settings: SweepSettings, processes: Processes
) -> tuple[dict[float, Tensor], dict[float, Tensor], dict[float, float], dict[float, float]]:
    """Estimate hard and power counts from sketches, calibrated on the exact rows of the audited queries.

    Noise lifts more pairs over a threshold than it lowers, for fewer pairs lie above it. So sketched similarities are counted
    from that τ' on above which as many of the audited pairs lie as lie above τ exactly; sums of powers are scaled by the ratio
    of the exact to the sketched sum over these pairs.

    Args:
        audit: the exact rows of this process's audited queries.
        sketches: of its queries, and of all reference samples.
        is_audited: which of the queries are audited, shape (Q,).
        settings: thresholds and powers.
        processes: those that share the sets.

    Returns:
        hard counts and power counts of the queries, and the root mean square error of each on the audited ones.
    """
    hard: dict[float, Tensor] = {}
    power: dict[float, Tensor] = {}
    hard_error: dict[float, float] = {}
    power_error: dict[float, float] = {}
    if not settings.thresholds and not settings.powers:
        return hard, power, hard_error, power_error
    vectors, ids = (torch.cat(column) for column in zip(*sketches.reference, strict=True))
    own = (sketches.own[is_audited.to(sketches.own.device)] @ vectors[ids.argsort().to(vectors.device)].mT).cpu()
    exact = processes.concatenate(audit.rows()[0] if audit.num_queries else own[:0])
    sketched = processes.concatenate(own)
    for tau in settings.thresholds:
        # At or above this level lie as many of the sketched similarities as of the exact ones at or above τ.
        number = int((exact >= tau).sum())
        level = float(sketched.flatten().sort(descending=True).values[number - 1]) if number else torch.inf
        hard[tau] = _row_sums(sketches.own, vectors, lambda tile, level=level: (tile >= level).float())  # type: ignore[misc]
        hard_error[tau] = _rms((sketched >= level).sum(1) - (exact >= tau).sum(1))
    for alpha in settings.powers:
        raised = sketched.clamp_min(0).pow(alpha)
        wanted = exact.clamp_min(0).pow(alpha)
        scale = float(wanted.sum() / raised.sum().clamp_min(1e-12))
        sums = _row_sums(sketches.own, vectors, lambda tile, alpha=alpha: tile.clamp_min(0).pow(alpha))  # type: ignore[misc]
        power[alpha] = scale * sums
        power_error[alpha] = _rms(scale * raised.sum(1) - wanted.sum(1))
    return hard, power, hard_error, power_error


def _row_sums(queries: Tensor, reference: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return Σ_j f(⟨q_i, r_j⟩) for every query, shape (Q,), tile by tile."""
    total = queries.new_zeros(len(queries))
    for rows in torch.split(torch.arange(len(queries), device=queries.device), 4 * TILE):
        for part in torch.split(reference, 4 * TILE):
            total[rows] += function(queries[rows] @ part.mT).sum(1)
    return total.cpu()


def _rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())
