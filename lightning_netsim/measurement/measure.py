"""Measure a set of samples: exact counts, neighbors by the plan that is cheapest, and an audit of what is not exact."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_neighbors_fit, expected
from lightning_netsim.data import trees
from lightning_netsim.data.batches import split_batch
from lightning_netsim.data.processes import Processes
from lightning_netsim.data.sources import Chunk, SampleSource, fixed_subset
from lightning_netsim.estimators import KernelNeighbors
from lightning_netsim.estimators.neighbor_table import AllPairs
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch, GradientFeatureBatch, UnitFeatureBatch
from lightning_netsim.measurement.candidates import (
    RecallAudit,
    Reranking,
    audit_with,
    compare_candidates,
    estimate_counts,
    shortlist_size,
    sketch_error,
)
from lightning_netsim.measurement.gather import Found, join
from lightning_netsim.measurement.plan import AUDITED_QUERIES, TILE, SetSizes, plan_record
from lightning_netsim.measurement.probe import TIMED_SAMPLES, prepare
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.ranking import Block, compare_all, exchanged, shared_blocks
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sums import Counted, Counting, Summed, class_labels_of
from lightning_netsim.measurement.sweep import Sweeper
from lightning_netsim.measurement.swept_set import FeatureStore, SweptSet

# faiss multiplies large matrices several times as fast as small ones.
_SEARCHED_AT_A_TIME = 2048


def measure_similarity(
    model: nn.Module,
    queries: SampleSource,
    reference: SampleSource | None = None,
    settings: SweepSettings | None = None,
    *,
    render: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    processes: Processes | None = None,
) -> SimilarityResult:
    """Count the neighbors of every query sample among the reference samples, and find the nearest.

    The model must be in eval mode. Random numbers in its forward pass are the same in every sweep; the global generators of
    torch are afterwards as before. Several `processes` all call this with the same sets; each differentiates its share, and all
    return the same result.

    Args:
        model: the network, with or without a `similarity_step`.
        queries: the samples that are asked about.
        reference: the samples that are counted; None compares the queries with themselves.
        settings: what is measured and within which bounds.
        render: turns one sample into a picture or text.
        progress: told about the work as it goes on.
        announce: told the plan, in one sentence, before the work begins.
        processes: those that share the work; None for this one alone.

    Raises:
        ValueError: for a model or batch that cannot be compared, a budget that is too small, k ≥ N, or processes that disagree
            about the data.
    """
    start = time.perf_counter()
    settings = settings or SweepSettings()
    sweeper = Sweeper(model, settings, progress)
    with _forked_rng(model), full_float32():
        measurement = _Measurement(sweeper, queries, reference, settings, render, processes or Processes())
        result = measurement.run(announce)
    return replace(result, seconds=time.perf_counter() - start)


def check_model(model: nn.Module, batch: Any, batch_idx: int, settings: SweepSettings) -> None:
    """Raise at once what `measure_similarity` would raise of this model and batch.

    Args:
        model: the network, in eval mode.
        batch: a batch.
        batch_idx: its number.
        settings: what is to be measured.
    """
    chunk = Chunk(batch, torch.arange(trees.batch_size(batch) or 1), batch_idx)
    size = len(chunk.index)
    sweeper = Sweeper(model, settings)
    with _forked_rng(model), full_float32():
        prepare(sweeper, next(chunk.split(TIMED_SAMPLES)), SetSizes(size, size, True), settings)


def _forked_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Put the generators of the CPU and of the model's devices back after the block."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


@dataclass(frozen=True)
class _Swept:
    """What one chunk gives in a first sweep.

    Attributes:
        summed: the sums over a part of the reference set.
        counted: the counts of queries that are no part of it.
        packed: φ of the valid samples; None where it is not kept.
        sketches: of the valid samples, shape (V, K); K = 0 where none are needed.
    """

    summed: Summed | None
    counted: Counted | None
    packed: PerSampleJacobian | None
    sketches: Tensor


class _Measurement:
    """One measurement: its two sets, what is counted over them, and the plan it goes by."""

    def __init__(
        self,
        sweeper: Sweeper,
        queries: SampleSource,
        reference: SampleSource | None,
        settings: SweepSettings,
        render: Callable[[Any], Any] | None,
        processes: Processes,
    ) -> None:
        self.settings = settings
        self.processes = processes
        self.sweeper = sweeper
        self.progress = self.sweeper.progress
        self.same = reference is None
        whole = reference or queries
        self.sizes = SetSizes(queries.num_samples, whole.num_samples, self.same, processes.size)
        self.prepared = prepare(self.sweeper, self._first_samples(queries), self.sizes, settings, self.processes)
        self.plan = self.prepared.plan
        self.sweeper.chunk_size, self.sweeper.forms = self.plan.chunk_size, self.plan.fast
        # Stored features are divided among the processes, in whole batches.
        self._capacity = math.ceil(self.plan.num_stored / processes.size) if self.plan.kind == "reiterate" else sys.maxsize
        self.audited = _audited_positions(queries, settings.seed)
        self.counting = Counting(self.prepared.budget, in_passing=self.plan.kind == "reiterate")
        rank, size = self.processes.rank, self.processes.size
        self.reference = SweptSet(whole.share(rank, size), self.prepared.budget, render)
        self.queries = self.reference if self.same else SweptSet(queries.share(rank, size), self.prepared.budget, render)
        self.audit_store = FeatureStore(len(self.audited))

    def run(self, announce: Callable[[str], None] | None) -> SimilarityResult:
        """Sweep over the reference set and the queries, rank, and return what was found."""
        if announce is not None:
            announce(" ".join([self.plan.describe(self.sizes.swept), *self.prepared.remarks(self.settings)]))
        if self.sizes.reference is not None:
            check_neighbors_fit(self.settings.k, self.sizes.reference, self.same)
        self._sweep_first(self.reference, "features" if self.same else "reference")
        check_neighbors_fit(self.settings.k, sum(self.processes.gather(self.reference.table.num_samples)), self.same)
        self.counting.share(self.reference, self.processes)
        if not self.same:
            self._sweep_first(self.queries, "queries")
        elif self.plan.kind != "reiterate":
            for features, ids in self.queries.store.blocks(TILE):
                self.counting.take_reference(UnitFeatureBatch(features), ids)
        activations = self._activation_neighbors()
        self.sweeper.watches_activations = False
        found = self._rank_all() if self.plan.kind == "store" else self._rank_candidates()
        return join(
            found,
            self.counting,
            activations,
            self.queries.table,
            self.reference.table,
            self.processes,
            num_directions=self.plan.num_directions,
            plan=plan_record(
                replace(self.plan, chunk_size=self.sweeper.chunk_size),
                self.sweeper.gradients.operator.ownership.methods(),
                self.prepared.budget,
            ),
            notes=tuple(sorted(set().union(*self.processes.gather(self.sweeper.gradients.notes | self.counting.notes)))),
        )

    def _first_samples(self, queries: SampleSource) -> Chunk:
        """Return a few samples of the set as a whole, after checking that all processes mean the same set."""
        torch.manual_seed(self.settings.seed)
        chunk = next(iter(queries), None)
        if chunk is None:
            raise expected("loader", "one that gives at least one batch", "none")
        few = next(chunk.split(TIMED_SAMPLES))
        labels = split_batch(few.batch)[1]
        said = labels.tolist() if isinstance(labels, Tensor) else None
        self.processes.check_agreement("the number of samples", (self.sizes.queries, self.sizes.reference))
        self.processes.check_agreement("the labels of the first samples", said)
        return few

    def _sweep_first(self, part: SweptSet, stage: str) -> None:
        """Go through a set for the first time: sum, sketch and keep what the plan needs."""
        counts = part is self.reference
        capacity = self._capacity if part.source.num_samples is None else min(self._capacity, part.source.num_samples)
        part.store = FeatureStore(capacity)

        def compute(chunk: Chunk, features: GradientFeatureBatch) -> _Swept:
            is_kept = len(part.store) < capacity or bool(torch.isin(chunk.index, self.audited).any())
            read = self.sweeper.read(chunk)
            return _Swept(
                self.counting.sum(features, read) if counts else None,
                None if counts else self.counting.ask(features, class_labels_of(read)),
                features.unit.packed(self.plan.fast) if is_kept else None,
                self._sketch(features),
            )

        for chunk, features, swept in self.sweeper.sweep(part.source, stage, compute, part.known):
            part.table.add(chunk, self.sweeper.read(chunk), features)
            ids = chunk.index[features.valid.cpu()]
            if swept.summed is not None:
                self.counting.add(swept.summed, len(ids))
            if swept.counted is not None:
                self.counting.take(swept.counted, features.valid, ids)
            part.sketches.append((swept.sketches, ids))
            if swept.packed is not None:
                room = capacity - len(part.store)
                part.store.add(swept.packed.select(slice(0, room)), ids[:room])
                self._keep_audited(part, swept.packed, ids)
            if self.sweeper.watches_activations:
                part.activations.append((self.sweeper.read_activations(), chunk.index))

    def _sketch(self, features: GradientFeatureBatch) -> Tensor:
        if self.plan.kind == "store":
            return features.norm.new_empty(int(features.valid.sum()), 0)
        return features.shortlist_vectors(self.prepared.projection, self.prepared.mixture)

    def _keep_audited(self, part: SweptSet, packed: PerSampleJacobian, ids: Tensor) -> None:
        keep = torch.isin(ids, self.audited)
        if part is self.queries and self.plan.kind != "store" and bool(keep.any()):
            self.audit_store.add(packed.select(keep), ids[keep])

    def _activation_neighbors(self) -> KernelNeighborsResult | None:
        if not self.sweeper.watches_activations:
            return None
        neighbors = KernelNeighbors(self.settings.k)
        held = [(batch.spread(batch.vectors()), ids) for batch, ids in self.reference.activations]
        for vectors, ids in (pair for held_elsewhere in self.processes.gather(held) for pair in held_elsewhere):
            neighbors.update(DenseFeatureBatch(vectors, normalize=False), ids)
        for batch, ids in self.queries.activations:
            neighbors.query(batch, ids if self.same else None)
        return neighbors.compute()

    def _rank_all(self) -> Found:
        """Compare all pairs."""
        queries, settings = self.queries.store, self.settings
        device, number = self.prepared.device, len(queries)
        pairs = AllPairs(max(1, number), settings.k, settings.thresholds, settings.powers, device)
        compare_all(
            queries,
            self.reference.store,
            pairs,
            self.processes,
            device,
            lambda done: self.progress("neighbors", done, number),
        )
        found = pairs.neighbors()
        return Found(
            self.queries.ids,
            KernelNeighborsResult(found.similarity[:number], found.index[:number], 1.0),
            {tau: count[:number].cpu() for tau, count in pairs.hard.items()},
            {alpha: count[:number].cpu() for alpha, count in pairs.power.items()},
            dict.fromkeys(pairs.hard, 0.0),
            dict.fromkeys(pairs.power, 0.0),
        )

    def _rank_candidates(self) -> Found:
        """Compare the candidates that sketches find, and audit."""
        ids, k = self.queries.ids, self.settings.k
        device = self.prepared.device
        gathered = self.processes.gather(self.reference.sketches)
        sketches = [(vectors.to(device), ids) for held in gathered for vectors, ids in held]
        own = self.queries.vectors(self.plan.num_features, device)
        shortlist = self._search(own, sketches)
        is_audited = torch.isin(ids, self.audit_store.ids)
        errors = self.processes.concatenate(sketch_error(self.audit_store, own[is_audited.to(own.device)]))
        reranking = Reranking(shortlist, k, float(errors.square().mean().sqrt()) if len(errors) else 0.0)
        audit = RecallAudit(self.audit_store.ids if self.same else torch.full_like(self.audit_store.ids, -1))
        if self.plan.kind == "sketch":
            self._compare_stored(reranking, audit)
        else:
            self._compare_in_sweeps(reranking, audit)
        neighbors = reranking.neighbors()
        audited = (neighbors.index[is_audited], neighbors.similarity[is_audited])
        estimate = estimate_counts(
            audit, own, is_audited, sketches, self.settings.thresholds, self.settings.powers, self.processes
        )
        return Found(ids, neighbors, *estimate, audit.hits(audited[0]), audit.squared_errors(*audited))

    def _search(self, own: Tensor, sketches: list[tuple[Tensor, Tensor]]) -> KernelNeighborsResult:
        """Return the shortlists of all own queries."""
        number = sum(len(ids) for _, ids in sketches)
        if number <= self.same:
            nobody = torch.full((len(self.queries.ids), 1), -1)
            return KernelNeighborsResult(nobody.float().fill_(torch.nan), nobody)
        size = shortlist_size(self.settings.k, number - self.same)
        neighbors = KernelNeighbors(size, self.settings.index_factory, settle_ties=False)
        for vectors, ids in sketches:
            neighbors.update(DenseFeatureBatch(vectors, normalize=False), ids)
        for start in range(0, len(own), _SEARCHED_AT_A_TIME):
            part = slice(start, start + _SEARCHED_AT_A_TIME)
            neighbors.query(DenseFeatureBatch(own[part], normalize=False), self.queries.ids[part] if self.same else None)
            self.progress("search", min(part.stop, len(own)), len(own))
        return neighbors.compute()

    def _compare_stored(self, reranking: Reranking, audit: RecallAudit) -> None:
        queries, reference = self.queries.store, self.reference.store
        rows = torch.arange(len(queries))
        for choose in (reranking.first, reranking.rest):
            chosen = choose()
            # In one block, every sample is formed as seldom as can be.
            whole = [] if reference.features is None else [(reference.features, reference.ids)]
            for block in whole if self.processes.alone else shared_blocks(reference, self.processes, self.prepared.device):
                compare_candidates(reranking, chosen, queries, rows, block, same=self.same and self.processes.alone)
        audit_with(audit, self.audit_store, shared_blocks(reference, self.processes, self.prepared.device))

    def _compare_in_sweeps(self, reranking: Reranking, audit: RecallAudit) -> None:
        """Sweep again for each lot of queries whose features fit into memory."""
        number, lot = len(self.queries.ids), self._capacity
        for start in range(0, max(self.processes.gather(number)), lot):
            following = FeatureStore(lot if start + lot < number else 0)
            wanted = self.queries.ids[start + lot : start + 2 * lot]
            chosen = reranking.first() | reranking.rest()
            rows = torch.arange(number)[start : start + lot]
            for block in exchanged(self._later_sweep(start == 0, following, wanted), self.processes, self.prepared.device):
                compare_candidates(reranking, chosen, self.queries.store, rows, block)
                if start == 0:
                    audit_with(audit, self.audit_store, [block])
            if not self.same and len(wanted):
                for packed, ids in self._packed_sweep(self.queries, "queries"):
                    _keep(following, packed, ids, wanted)
            self.queries.store = following

    def _later_sweep(self, first: bool, following: FeatureStore, wanted: Tensor) -> Iterator[Block]:
        """Yield the reference samples of this process again; keep those that are `wanted` next, and count once."""
        counted = first and self.same
        for packed, ids in self._packed_sweep(self.reference, "neighbors"):
            if counted:
                self.counting.take_reference(UnitFeatureBatch(packed), ids)
            if self.same:
                _keep(following, packed, ids, wanted)
            yield packed, ids

    def _packed_sweep(self, part: SweptSet, stage: str) -> Iterator[Block]:
        def compute(chunk: Chunk, features: GradientFeatureBatch) -> PerSampleJacobian:
            return features.unit.packed(self.plan.fast)

        for chunk, features, packed in self.sweeper.sweep(part.source, stage, compute, part.known):
            yield packed, chunk.index[features.valid.cpu()]


def _audited_positions(queries: SampleSource, seed: int) -> Tensor:
    """Return the positions of the audited queries in their data set: random where its length is known, else the first."""
    total = queries.num_samples
    chosen = None if total is None else fixed_subset(total, AUDITED_QUERIES, seed + 1)
    if chosen is None:
        chosen = torch.arange(AUDITED_QUERIES if total is None else total)
    return chosen if queries.positions is None else queries.positions[chosen]


def _keep(store: FeatureStore, packed: PerSampleJacobian, ids: Tensor, wanted: Tensor) -> None:
    keep = torch.isin(ids, wanted)
    if bool(keep.any()):
        store.add(packed.select(keep), ids[keep])
