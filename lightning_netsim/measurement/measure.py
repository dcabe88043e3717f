"""Measure a set of samples: exact counts, neighbors by the plan that is cheapest, and an audit of what is not exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_neighbors_fit, expected
from lightning_netsim.data import trees
from lightning_netsim.data.batches import split_batch
from lightning_netsim.data.processes import Processes
from lightning_netsim.data.sources import Chunk, SampleSource, fixed_subset
from lightning_netsim.estimators import KernelNeighbors
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch, UnitFeatureBatch
from lightning_netsim.measurement.candidates import (
    RecallAudit,
    Reranking,
    Sketches,
    audit_with,
    compare_candidates,
    compare_stored,
    rank_candidates,
)
from lightning_netsim.measurement.gather import merge_results
from lightning_netsim.measurement.plan import AUDITED_QUERIES, TILE, SetSizes
from lightning_netsim.measurement.probe import TIMED_SAMPLES, Preparation, prepare
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.ranking import Ranked, exchanged, rank_all
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sums import Counting
from lightning_netsim.measurement.sweep import FeatureReader, Sweeper, Swept
from lightning_netsim.measurement.swept_set import Block, FeatureStore, SweptSet

T = TypeVar("T")


def measure_similarity(
    model: nn.Module,
    queries: SampleSource,
    reference: SampleSource | None = None,
    settings: SweepSettings | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    processes: Processes | None = None,
) -> SimilarityResult:
    """Count the neighbors of every query sample among the reference samples, and find the nearest.

    The model must be in eval mode. Random numbers in its forward pass are the same in every sweep; the global generators of
    torch are afterwards as before. Several `processes` all call this with the same sets; each differentiates its part, and all
    return the same result.

    Args:
        model: the network, with or without a `similarity_step`.
        queries: the samples that are asked about.
        reference: the samples that are counted; None compares the queries with themselves.
        settings: what is measured and within which bounds.
        progress: told about the work as it goes on.
        announce: told the plan, in one sentence, before the work begins.
        processes: those that share the work; None for this one alone.

    Raises:
        ValueError: for a model or batch that cannot be compared, a budget that is too small, k ≥ N, or processes that disagree
            about the data.
    """
    start = time.perf_counter()
    settings, processes = settings or SweepSettings(), processes or Processes()
    progress = progress or (lambda stage, done, total: None)
    whole = reference or queries
    sizes = SetSizes(queries.num_samples, whole.num_samples, reference is None, processes.size)
    reader = FeatureReader(model, settings)  # Before autocast is switched off, which it may inherit.
    with _exact(model):
        few = _first_samples(queries, sizes, settings.seed, processes)
        prepared = prepare(reader, few, sizes, settings, processes)
        if announce is not None:
            announce(prepared.describe())
        if sizes.reference is not None:
            check_neighbors_fit(settings.k, sizes.reference, sizes.same)
        sweeper = Sweeper(reader, prepared.plan.chunk_size, prepared.plan.fast, settings.seed, progress)
        result = _Measurement(prepared, sweeper, processes, progress).run(queries, whole)
    return replace(result, seconds=time.perf_counter() - start)


def check_model(model: nn.Module, batch: Any, batch_idx: int, settings: SweepSettings) -> None:
    """Raise at once what `measure_similarity` would raise of this model and batch.

    Args:
        model: the network, in eval mode.
        batch: a batch.
        batch_idx: its number.
        settings: what is to be measured.
    """
    size = trees.batch_size(batch) or 1
    chunk = next(Chunk(batch, torch.arange(size), batch_idx).split(TIMED_SAMPLES))
    reader = FeatureReader(model, settings)
    with _exact(model):
        prepare(reader, chunk, SetSizes(size, size, True), settings)


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Compute in full float32, and put the generators of the CPU and of the model's devices back after the block."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), full_float32():
        yield


def _first_samples(queries: SampleSource, sizes: SetSizes, seed: int, processes: Processes) -> Chunk:
    """Return a few samples of the set as a whole, after checking that all processes mean the same set."""
    torch.manual_seed(seed)
    chunk = next(iter(queries), None)
    if chunk is None:
        raise expected("loader", "one that gives at least one batch", "none")
    few = next(chunk.split(TIMED_SAMPLES))
    labels = split_batch(few.batch)[1]
    processes.check_agreement("the number of samples", (sizes.queries, sizes.reference))
    processes.check_agreement("the labels of the first samples", labels.tolist() if isinstance(labels, Tensor) else None)
    return few


@dataclass(frozen=True)
class _Measurement:
    """The way of one measurement through its sets, as it is prepared."""

    prepared: Preparation
    sweeper: Sweeper
    processes: Processes
    progress: Progress

    def run(self, asked: SampleSource, whole: SampleSource) -> SimilarityResult:
        """Sweep over the reference set `whole` and the queries, rank, and merge what all processes found."""
        prepared, plan, processes = self.prepared, self.prepared.plan, self.processes
        settings, same, reader = prepared.settings, prepared.sizes.same, self.sweeper.reader
        positions = _audited_positions(asked, settings.seed) if plan.kind != "store" else torch.zeros(0, dtype=torch.int64)
        audited = FeatureStore(len(positions))
        counting = Counting(prepared.budget, in_passing=plan.kind == "reiterate")

        stage = "features" if same else "reference"
        reference = self._set_of(whole, keeps=same or plan.kind != "reiterate")
        for swept, summed, packed in self._first_sweep(
            reference, stage, lambda swept: counting.sum(swept.features, swept.read), positions if same else None
        ):
            counting.add(summed, len(swept.valid_ids))
            if same and packed is not None:
                audited.add_some(packed, swept.valid_ids, positions)
        check_neighbors_fit(settings.k, sum(processes.gather(reference.table.num_samples)), same)
        counting.merge(reference, processes)

        queries = reference
        if not same:
            queries = self._set_of(asked, keeps=True)
            for swept, counted, packed in self._first_sweep(
                queries, "queries", lambda swept: counting.ask(swept.features, swept.read), positions
            ):
                counting.take(counted, swept.features.valid, swept.valid_ids)
                if packed is not None:
                    audited.add_some(packed, swept.valid_ids, positions)
        elif plan.kind != "reiterate":
            for features, ids in queries.store.blocks(TILE):
                counting.take_reference(UnitFeatureBatch(features), ids)

        activations = self._activation_neighbors(queries, reference) if reader.has_activations else None
        ranked = self._rank(queries, reference, audited, counting)
        notes = set().union(*processes.gather(reader.gradients.notes | counting.notes))
        methods = reader.gradients.operator.ownership.methods()
        return merge_results(
            ranked,
            counting,
            activations,
            queries.table,
            reference.table,
            processes,
            num_directions=plan.num_directions,
            plan=plan.as_record(self.sweeper.chunk_size, methods, prepared.budget),
            notes=tuple(sorted(notes)),
        )

    @property
    def _lot(self) -> int:
        """Return how many queries of this process are ranked at a time: stored features are divided, in whole batches."""
        return math.ceil(self.prepared.plan.num_stored / self.processes.size)

    def _set_of(self, source: SampleSource, keeps: bool) -> SweptSet:
        """Return the part of a set that this process takes; `keeps` says whether exact features of it are stored."""
        part = source.split(self.processes.rank, self.processes.size)
        most = part.num_samples if part.num_samples is not None else self._lot
        capacity = 0 if not keeps else min(most, self._lot) if self.prepared.plan.kind == "reiterate" else most
        return SweptSet(part, self.prepared.budget, self.prepared.settings.render, capacity)

    def _first_sweep(
        self, part: SweptSet, stage: str, count: Callable[[Swept], T], audited: Tensor | None
    ) -> Iterator[tuple[Swept, T, PerSampleJacobian | None]]:
        """Go through a set for the first time: count, sketch, and keep what the plan needs.

        Yields:
            each chunk, what `count` made of it, and its packed features if some are stored or `audited`.
        """

        def compute(swept: Swept) -> tuple[T, PerSampleJacobian | None, Tensor]:
            counted = count(swept)
            is_audited = audited is not None and bool(torch.isin(swept.chunk.index, audited).any())
            is_kept = len(part.store) < part.store.capacity or is_audited
            packed = swept.features.unit.packed(self.prepared.plan.fast) if is_kept else None
            return counted, packed, self.prepared.sketch(swept.features)

        watches = self.sweeper.reader.has_activations
        for swept, (counted, packed, sketches) in self.sweeper.sweep(part.source, stage, compute, activations=watches):
            part.add(swept, packed, sketches)
            yield swept, counted, packed

    def _activation_neighbors(self, queries: SweptSet, reference: SweptSet) -> KernelNeighborsResult:
        neighbors = KernelNeighbors(self.prepared.settings.k)
        held = [(batch.spread(batch.vectors()), ids) for batch, ids in reference.activations]
        for vectors, ids in (pair for held_elsewhere in self.processes.gather(held) for pair in held_elsewhere):
            neighbors.update(DenseFeatureBatch(vectors, normalize=False), ids)
        for batch, ids in queries.activations:
            neighbors.query(batch, ids if queries is reference else None)
        return neighbors.compute()

    def _rank(self, queries: SweptSet, reference: SweptSet, audited: FeatureStore, counting: Counting) -> Ranked:
        """Rank by all pairs, or by candidates, as planned."""
        plan, settings, device = self.prepared.plan, self.prepared.settings, self.prepared.device
        if plan.kind == "store":
            return rank_all(queries.store, reference.store, settings, self.processes, device, self.progress)
        gathered = self.processes.gather(reference.sketches)
        sketches = Sketches(
            queries.ids,
            queries.vectors(plan.num_features, device),
            [(vectors.to(device), ids) for held in gathered for vectors, ids in held],
            queries is reference,
        )
        if plan.kind == "sketch":
            compare = partial(compare_stored, queries.store, reference.store, audited, self.processes, device)
        else:
            compare = partial(self._compare_in_sweeps, queries, reference, audited, counting)
        return rank_candidates(sketches, audited, compare, settings, self.processes, self.progress)

    def _compare_in_sweeps(
        self,
        queries: SweptSet,
        reference: SweptSet,
        audited: FeatureStore,
        counting: Counting,
        reranking: Reranking,
        audit: RecallAudit,
    ) -> None:
        """Sweep again for each lot of queries whose features fit into memory; in the first of these sweeps, count too."""
        same, number, lot = queries is reference, len(queries.ids), self._lot
        stored = queries.hand_over_store()
        for start in range(0, max(self.processes.gather(number)), lot):
            following = FeatureStore(lot if start + lot < number else 0)
            wanted = queries.ids[start + lot : start + 2 * lot]
            chosen = reranking.first() | reranking.rest()
            rows = torch.arange(number)[start : start + lot]
            sweep = self._packed_sweep(reference, "neighbors")
            if same:
                sweep = self._taken(sweep, counting if start == 0 else None, following, wanted)
            for block in exchanged(sweep, self.processes, self.prepared.device):
                compare_candidates(reranking, chosen, stored, rows, block)
                if start == 0:
                    audit_with(audit, audited, [block])
            if not same and len(wanted):
                for packed, ids in self._packed_sweep(queries, "queries"):
                    following.add_some(packed, ids, wanted)
            stored = following

    @staticmethod
    def _taken(sweep: Iterator[Block], counting: Counting | None, following: FeatureStore, wanted: Tensor) -> Iterator[Block]:
        """Yield the blocks of a set that is compared with itself; count them once, and keep those that are ranked next."""
        for packed, ids in sweep:
            if counting is not None:
                counting.take_reference(UnitFeatureBatch(packed), ids)
            following.add_some(packed, ids, wanted)
            yield packed, ids

    def _packed_sweep(self, part: SweptSet, stage: str) -> Iterator[Block]:
        """Go through a set again; yield packed features and ids of its valid samples."""
        fast = self.prepared.plan.fast
        sweep = self.sweeper.sweep(part.source, stage, lambda swept: swept.features.unit.packed(fast), part.normalizations)
        for swept, packed in sweep:
            yield packed, swept.valid_ids


def _audited_positions(queries: SampleSource, seed: int) -> Tensor:
    """Return the positions of the audited queries in their data set: random where its length is known, else the first."""
    total = queries.num_samples
    chosen = None if total is None else fixed_subset(total, AUDITED_QUERIES, seed + 1)
    if chosen is None:
        chosen = torch.arange(AUDITED_QUERIES if total is None else total)
    return chosen if queries.positions is None else queries.positions[chosen]
