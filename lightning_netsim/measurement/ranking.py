"""Rank neighbors: what a ranking gives, and the ranking of all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators.neighbor_table import AllPairs
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.measurement.plan import TILE
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.swept_set import Block, FeatureStore


@dataclass(frozen=True, eq=False)
class Ranked:
    """What was found of the valid queries of this process.

    Attributes:
        ids: shape (V,), which samples these are.
        neighbors: shape (V, k).
        hard: hard counts, shape (V,), by τ.
        power: power counts, shape (V,), by α.
        hard_error: the root mean square error of each, where they are estimates; else 0.
        power_error: likewise.
        hits: which listed neighbors of the audited queries are right, shape (A, k); None where all pairs were compared.
        squared_errors: of the listed similarities of the audited queries.
    """

    ids: Tensor
    neighbors: KernelNeighborsResult
    hard: dict[float, Tensor] = field(default_factory=dict)
    power: dict[float, Tensor] = field(default_factory=dict)
    hard_error: dict[float, float] = field(default_factory=dict)
    power_error: dict[float, float] = field(default_factory=dict)
    hits: Tensor | None = None
    squared_errors: Tensor | None = None


def exchanged(blocks: Iterable[Block], processes: Processes, device: torch.device) -> Iterator[Block]:
    """Yield the blocks of all processes to each of them, in the same order, on its own device."""
    if processes.alone:
        yield from blocks
        return
    sent = ((features.moved(torch.device("cpu")), ids) for features, ids in blocks)
    for features, ids in processes.interleave(sent):
        yield features.moved(device), ids


def rank_all(
    queries: FeatureStore,
    reference: FeatureStore,
    settings: SweepSettings,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> Ranked:
    """Compare all pairs of own queries and the reference samples of all processes, exactly.

    Args:
        queries: the queries of this process.
        reference: its reference samples; the same object where a set is compared with itself.
        settings: k, thresholds and powers.
        processes: those that share the sets.
        device: where the features are.
        progress: told the number of queries whose rows are complete.
    """
    number, same = len(queries), queries is reference
    pairs = AllPairs(max(1, number), settings.k, settings.thresholds, settings.powers, device)
    if same and processes.alone:
        for done in _compare_with_itself(queries, pairs):
            progress("neighbors", done, number)
    else:
        for features, ids in exchanged(reference.blocks(TILE), processes, device):
            start = 0
            for own, own_ids in queries.blocks(TILE):
                rows = torch.arange(start, start + len(own_ids))
                pairs.offer(own.trace_inner(features), ids, rows, own_ids if same else None)
                start += len(own_ids)
        progress("neighbors", number, number)
    found = pairs.neighbors()
    return Ranked(
        queries.ids,
        KernelNeighborsResult(found.similarity[:number], found.index[:number], 1.0),
        {tau: count[:number].cpu() for tau, count in pairs.hard.items()},
        {alpha: count[:number].cpu() for alpha, count in pairs.power.items()},
        dict.fromkeys(pairs.hard, 0.0),
        dict.fromkeys(pairs.power, 0.0),
    )


def _compare_with_itself(store: FeatureStore, pairs: AllPairs) -> Iterator[int]:
    """Offer all pairs of one set, forming each tile on and above the diagonal once; yield how many rows are complete."""
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
        yield start
