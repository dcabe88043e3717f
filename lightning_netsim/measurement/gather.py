"""Merge what the processes found of their parts, in the order of the data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_netsim.data.labels import are_classes
from lightning_netsim.data.processes import Processes
from lightning_netsim.functional.results import KernelNeighborsResult, NeighborCountResult
from lightning_netsim.measurement.ranking import Ranked
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.sample_table import SampleTable
from lightning_netsim.measurement.sums import Counting


def merge_results(
    ranked: Ranked,
    counting: Counting,
    activations: KernelNeighborsResult | None,
    queries: SampleTable,
    reference: SampleTable,
    processes: Processes,
    **facts: Any,
) -> SimilarityResult:
    """Return the result of all processes, the same in each.

    Args:
        ranked: of the valid queries of this process.
        counting: the sums over the reference set, and the counts of these queries.
        activations: neighbors under activations of all its queries; None if they are not wanted.
        queries: the queries of this process.
        reference: its reference samples; the same object where a set is compared with itself.
        processes: those that share the sets.
        facts: what else stands in the result.
    """
    same = reference is queries
    rows = _in_rows(ranked, counting, activations, queries)
    order = queries.merge(processes)
    merged = {name: processes.concatenate(value)[order] for name, value in rows.items()}
    if not same:
        reference.merge(processes)
    counts = NeighborCountResult(
        merged["soft"],
        counting.count.num_reference,
        {tau: merged[f"hard {tau}"] for tau in ranked.hard},
        {alpha: merged[f"power {alpha}"] for alpha in ranked.power},
        ranked.hard_error,
        ranked.power_error,
    )
    samples = queries.sample_set()
    same_class = other_class = None
    if counting.classes.is_kept and samples.labels is not None and are_classes(samples.labels):
        same_class, other_class = counting.classes.means(merged["own"], merged["soft"], samples.labels, same)
    recall: float | None = 1.0
    error: float | None = 0.0
    if ranked.hits is not None and ranked.squared_errors is not None:
        hits = torch.cat(processes.gather(ranked.hits.float().flatten()))
        errors = torch.cat(processes.gather(ranked.squared_errors))
        recall = float(hits.mean()) if len(hits) else None
        error = float(errors.mean().sqrt()) if len(errors) else None
    # Σ N_S = ‖S‖² where the sweeps saw the same network and the same samples.
    squared = counting.count.squared_norm() if same else 0.0
    disagreement = abs(float(counts.soft.double().nansum()) - squared) / squared if squared > 0 else None
    return SimilarityResult(
        counts=counts,
        neighbors=KernelNeighborsResult(merged["similarity"], merged["index"], recall),
        activation_neighbors=None
        if activations is None
        else KernelNeighborsResult(merged["activation similarity"], merged["activation index"], 1.0),
        queries=samples,
        reference=samples if same else reference.sample_set(),
        classes=counting.classes.compute(),
        same_class=same_class,
        other_class=other_class,
        margin=queries.margin(),
        predictions=queries.predictions(),
        norm=queries.norm,
        rank=queries.rank,
        num_left_out=sum(table.num_samples - table.num_valid for table in ([queries] if same else [queries, reference])),
        similarity_error=error,
        sweep_disagreement=disagreement,
        **facts,
    )


def _in_rows(
    ranked: Ranked, counting: Counting, activations: KernelNeighborsResult | None, table: SampleTable
) -> dict[str, Tensor]:
    """Return everything in the rows of the table of samples, those that were left out included: NaN, or -1, for these."""

    def placed(values: Tensor, ids: Tensor) -> Tensor:
        filler = torch.nan if values.is_floating_point() else -1
        every = torch.full((table.num_samples, *values.shape[1:]), filler, dtype=values.dtype)
        every[table.rows_of(ids)] = values
        return every

    rows = {
        "soft": placed(*counting.soft),
        "own": placed(*counting.own),
        "similarity": placed(ranked.neighbors.similarity, ranked.ids),
        "index": placed(ranked.neighbors.index, ranked.ids),
        **{f"hard {tau}": placed(values, ranked.ids) for tau, values in ranked.hard.items()},
        **{f"power {alpha}": placed(values, ranked.ids) for alpha, values in ranked.power.items()},
    }
    if activations is not None:
        rows |= {"activation similarity": activations.similarity, "activation index": activations.index}
    return rows
