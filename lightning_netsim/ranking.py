"""Rank neighbors by exact similarities: of all pairs, or of the candidates that a sketch found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_netsim.estimators import AllPairs, RecallAudit, Reranking
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.plan import TILE
from lightning_netsim.processes import Processes
from lightning_netsim.store import FeatureStore
from lightning_netsim.tiles import tiles

#: Features of some reference samples, and their ids.
Block = tuple[PerSampleJacobian, Tensor]

# Queries and candidates of which all pairs are compared at a time; more where one query has that many.
_TILED_SAMPLES = 256


def shared_blocks(store: FeatureStore, processes: Processes, device: torch.device) -> Iterator[Block]:
    """Yield the features of all processes' stores, some hundred samples at a time, in the same order in all of them."""
    return exchanged(store.blocks(TILE), processes, device)


def exchanged(blocks: Iterable[Block], processes: Processes, device: torch.device) -> Iterator[Block]:
    """Yield the blocks of all processes to each of them, on its own device."""
    if processes.alone:
        yield from blocks
        return
    sent = ((features.moved(torch.device("cpu")), ids) for features, ids in blocks)
    for features, ids in processes.interleave(sent):
        yield features.moved(device), ids


def compare_all(
    queries: FeatureStore,
    reference: FeatureStore,
    pairs: AllPairs,
    processes: Processes,
    device: torch.device,
    progress: Callable[[int], None],
) -> None:
    """Offer the exact similarities of all pairs of own queries and the reference samples of all processes.

    Args:
        queries: the queries of this process.
        reference: its reference samples; the same object where a set is compared with itself.
        pairs: takes the tiles; its rows are those of `queries`.
        processes: those that share the sets.
        device: where the features are.
        progress: told the number of queries whose rows are complete.
    """
    same = queries is reference
    if same and processes.alone:
        _compare_with_itself(queries, pairs, progress)
        return
    for features, ids in shared_blocks(reference, processes, device):
        start = 0
        for own, own_ids in queries.blocks(TILE):
            rows = torch.arange(start, start + len(own_ids))
            pairs.offer(own.trace_inner(features), ids, rows, own_ids if same else None)
            start += len(own_ids)
    progress(len(queries))


def _compare_with_itself(store: FeatureStore, pairs: AllPairs, progress: Callable[[int], None]) -> None:
    """Offer all pairs of one set, forming each tile on and above the diagonal once."""
    blocks, start = list(store.blocks(TILE)), 0
    for number, (features, ids) in enumerate(blocks):
        rows = torch.arange(start, start + len(ids))
        other_start = start
        for other, other_ids in blocks[number:]:
            similarity = features.trace_inner(other)
            other_rows = torch.arange(other_start, other_start + len(other_ids))
            pairs.offer(similarity, other_ids, rows, ids)
            if other is not features:
                pairs.offer(similarity.mT, ids, other_rows, other_ids)
            other_start += len(other_ids)
        start += len(ids)
        progress(start)


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
    audit: RecallAudit,
    sketches: Tensor,
    is_audited: Tensor,
    reference: list[tuple[Tensor, Tensor]],
    thresholds: Iterable[float],
    powers: Iterable[float],
    processes: Processes,
) -> tuple[dict[float, Tensor], dict[float, Tensor], dict[float, float], dict[float, float]]:
    """Estimate hard and power counts from sketches, calibrated on the exact rows of the audited queries.

    Noise lifts more pairs over a threshold than it lowers, for fewer pairs lie above it. So sketched similarities are counted
    from that τ' on above which as many of the audited pairs lie as lie above τ exactly; sums of powers are scaled by the ratio
    of the exact to the sketched sum over these pairs.

    Args:
        audit: the exact rows of this process's audited queries.
        sketches: of its queries, shape (Q, K).
        is_audited: which of them are audited, shape (Q,).
        reference: sketches and ids of all reference samples.
        thresholds: τ.
        powers: α.
        processes: those that share the sets.

    Returns:
        hard counts and power counts of the queries, and the root mean square error of each on the audited ones.
    """
    hard: dict[float, Tensor] = {}
    power: dict[float, Tensor] = {}
    hard_error: dict[float, float] = {}
    power_error: dict[float, float] = {}
    thresholds, powers = tuple(thresholds), tuple(powers)
    if not thresholds and not powers:
        return hard, power, hard_error, power_error
    vectors, ids = (torch.cat(column) for column in zip(*reference, strict=True))
    own = (sketches[is_audited.to(sketches.device)] @ vectors[ids.argsort().to(vectors.device)].mT).cpu()
    exact = processes.concatenate(audit.rows()[0] if audit.num_queries else own[:0])
    sketched = processes.concatenate(own)
    for tau in thresholds:
        level = _level(sketched, int((exact >= tau).sum()))
        hard[tau] = _row_sums(sketches, vectors, lambda tile, level=level: (tile >= level).float())  # type: ignore[misc]
        hard_error[tau] = _rms((sketched >= level).sum(1) - (exact >= tau).sum(1))
    for alpha in powers:
        raised = sketched.clamp_min(0).pow(alpha)
        wanted = exact.clamp_min(0).pow(alpha)
        scale = float(wanted.sum() / raised.sum().clamp_min(1e-12))
        power[alpha] = scale * _row_sums(sketches, vectors, lambda tile, alpha=alpha: tile.clamp_min(0).pow(alpha))  # type: ignore[misc]
        power_error[alpha] = _rms(scale * raised.sum(1) - wanted.sum(1))
    return hard, power, hard_error, power_error


def _level(values: Tensor, number: int) -> float:
    """Return the level at or above which the `number` largest values lie."""
    if number == 0:
        return torch.inf
    return float(values.flatten().sort(descending=True).values[number - 1])


def _row_sums(queries: Tensor, reference: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return Σ_j f(⟨q_i, r_j⟩) for every query, shape (Q,), tile by tile."""
    total = queries.new_zeros(len(queries))
    for rows in torch.split(torch.arange(len(queries), device=queries.device), 4 * TILE):
        for part in torch.split(reference, 4 * TILE):
            total[rows] += function(queries[rows] @ part.mT).sum(1)
    return total.cpu()


def _rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())
