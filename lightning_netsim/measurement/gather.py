"""Join what the processes found of their shares, in the order of the data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators import NeighborCount
from lightning_netsim.functional.results import KernelNeighborsResult, NeighborCountResult
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.sample_table import SampleTable, are_classes
from lightning_netsim.measurement.sums import Counting


@dataclass(frozen=True)
class Found:
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
    hard: dict[float, Tensor]
    power: dict[float, Tensor]
    hard_error: dict[float, float]
    power_error: dict[float, float]
    hits: Tensor | None = None
    squared_errors: Tensor | None = None


def join(
    found: Found,
    counting: Counting,
    activations: KernelNeighborsResult | None,
    queries: SampleTable,
    reference: SampleTable,
    processes: Processes,
    **facts: Any,
) -> SimilarityResult:
    """Return the result of all processes, the same in each.

    Args:
        found: of the valid queries of this process.
        counting: the sums over the reference set, and the counts of these queries.
        activations: neighbors under activations of all its queries; None if they are not wanted.
        queries: the queries of this process.
        reference: its reference samples; the same object where a set is compared with itself.
        processes: those that share the sets.
        facts: what else stands in the result.
    """
    rows = _in_rows(found, counting, activations, queries)
    order = queries.share(processes)
    joined = {name: processes.concatenate(value)[order] for name, value in rows.items()}
    if reference is not queries:
        reference.share(processes)
    recall, error = _audited(found, processes)
    counts = NeighborCountResult(
        joined["soft"],
        counting.count.num_reference,
        {tau: joined[f"hard {tau}"] for tau in found.hard},
        {alpha: joined[f"power {alpha}"] for alpha in found.power},
        found.hard_error,
        found.power_error,
    )
    tables = [queries] if reference is queries else [queries, reference]
    samples = queries.sample_set()
    same_class, other_class = _class_means(counting, joined, samples.labels, reference is queries)
    return SimilarityResult(
        counts=counts,
        neighbors=KernelNeighborsResult(joined["similarity"], joined["index"], recall),
        activation_neighbors=None
        if activations is None
        else KernelNeighborsResult(joined["activation similarity"], joined["activation index"], 1.0),
        queries=samples,
        reference=samples if reference is queries else reference.sample_set(),
        classes=counting.classes.compute(),
        same_class=same_class,
        other_class=other_class,
        margin=queries.margin(),
        predictions=queries.predictions(),
        norm=queries.norm,
        rank=queries.rank,
        num_left_out=sum(table.num_samples - table.num_valid for table in tables),
        similarity_error=error,
        sweep_disagreement=_disagreement(counts, counting.count) if reference is queries else None,
        seconds=0.0,
        **facts,
    )


def _in_rows(
    found: Found,
    counting: Counting,
    activations: KernelNeighborsResult | None,
    table: SampleTable,
) -> dict[str, Tensor]:
    """Return everything in the rows of the table of samples, those that were left out included."""
    rows, number = table.rows_of(found.ids), table.num_samples
    placed = {
        **{
            name: _placed(values, table.rows_of(ids), number)
            for name, (values, ids) in {"soft": counting.soft, "own": counting.own}.items()
        },
        "similarity": _placed(found.neighbors.similarity, rows, number),
        "index": _placed(found.neighbors.index, rows, number),
        **{f"hard {tau}": _placed(values, rows, number) for tau, values in found.hard.items()},
        **{f"power {alpha}": _placed(values, rows, number) for alpha, values in found.power.items()},
    }
    if activations is not None:
        placed |= {"activation similarity": activations.similarity, "activation index": activations.index}
    return placed


def _class_means(
    counting: Counting, joined: dict[str, Tensor], labels: list[Any] | None, same: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean similarities to the own class and to the others; None where there are no classes."""
    if not counting.classes.is_kept or labels is None or not are_classes(labels):
        return None, None
    return counting.classes.means(joined["own"], joined["soft"], labels, same)


def _placed(values: Tensor, rows: Tensor, number: int) -> Tensor:
    """Return values of the valid samples, shape (V, ...), in the rows of all, shape (number, ...): NaN, or -1, elsewhere."""
    filler = torch.nan if values.is_floating_point() else -1
    placed = torch.full((number, *values.shape[1:]), filler, dtype=values.dtype)
    placed[rows] = values
    return placed


def _audited(found: Found, processes: Processes) -> tuple[float | None, float | None]:
    """Return the recall and the root mean square error of the listed similarities, over the audits of all processes."""
    if found.hits is None:
        return 1.0, 0.0
    hits = _all(processes.gather(found.hits.float().flatten()))
    errors = _all(processes.gather(found.squared_errors))
    return float(hits.mean()) if len(hits) else None, float(errors.mean().sqrt()) if len(errors) else None


def _all(parts: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(0), *(part for part in parts if part is not None)])


def _disagreement(counts: NeighborCountResult, count: NeighborCount) -> float | None:
    """Return |Σ N_S − ‖S‖²| / ‖S‖²."""
    squared = count.squared_norm()
    return abs(float(counts.soft.double().nansum()) - squared) / squared if squared > 0 else None
