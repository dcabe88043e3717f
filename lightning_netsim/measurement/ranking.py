"""Compare all pairs, with the features of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators.neighbor_table import AllPairs
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.measurement.plan import TILE
from lightning_netsim.measurement.swept_set import FeatureStore

#: Features of some reference samples, and their ids.
Block = tuple[PerSampleJacobian, Tensor]


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
