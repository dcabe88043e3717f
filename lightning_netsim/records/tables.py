"""From what a measurement found to the tables of a record."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
import torch

from lightning_netsim.data.labels import are_classes, are_of_classes
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian import Directions
from lightning_netsim.measurement.result import SampleSet, SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.records.record import SCHEMA_VERSION, Record

_PACKAGES = {"lightning_netsim": "lightning-netsim", "torch": "torch", "lightning": "lightning", "faiss": "faiss-cpu"}


def make_record(result: SimilarityResult, settings: SweepSettings, context: Mapping[str, Any]) -> Record:
    """Return the tables of a measurement and what they were made with.

    Args:
        result: what was found.
        settings: how it was measured.
        context: what only the caller knows, where it differs from an analysis of plain weights: stage, epoch, global_step,
            reference, weights, class_names.
    """
    activations, classes = result.activation_neighbors, None
    if result.classes is not None:
        names, number = result.classes.classes, len(result.classes.classes)
        classes = pd.DataFrame(
            {
                "label": [label for label in names for _ in range(number)],
                "other_label": names * number,
                "similarity": result.classes.similarity.double().flatten().numpy(),
                "num_samples": result.classes.num_samples.repeat_interleave(number).numpy(),
            }
        )
    usual = {
        "stage": None,
        "epoch": None,
        "global_step": None,
        "reference": "self" if result.compares_with_itself else "other",
        "weights": "raw",
        "class_names": settings.class_names,
    }
    return Record(
        samples=_samples(result),
        neighbors=_neighbors(result.neighbors, result.queries, result.reference),
        activation_neighbors=None if activations is None else _neighbors(activations, result.queries, result.reference),
        meta={**_meta(result, settings), **usual, **context},
        classes=classes,
    )


def scalars(record: Record) -> dict[str, float]:
    """Return the figures to log: mean neighbor fraction, share of neighbors of the same class, recall, samples left out."""
    values = {"neighbor_fraction": float(record.samples["neighbor_fraction"].mean())}
    if "same_class_fraction" in record.samples:
        values["same_class_fraction"] = float(record.samples["same_class_fraction"].mean())
    if record.meta["recall"] is not None:
        values["recall"] = float(record.meta["recall"])
    return {**values, "left_out": float(record.meta["num_left_out"])}


def _samples(result: SimilarityResult) -> pd.DataFrame:
    """Return one row for each query; the share of its neighbors that have its label is NaN where there are none."""
    queries = result.queries
    soft = result.counts.soft.double().cpu()
    table = pd.DataFrame(
        {
            "sample_id": queries.index.tolist() if queries.ids is None else queries.ids,
            "index": queries.index.numpy(),
            "dataloader": queries.dataloader.numpy(),
        }
    )
    classifies = queries.labels is None or are_of_classes(result.predictions, queries.labels)
    if queries.labels is not None:
        table["label"] = queries.labels
        if classifies:
            table["prediction"] = result.predictions
    if classifies and result.margin is not None:
        table["margin"] = result.margin.numpy()
    table["soft_count"] = soft.numpy()
    table["neighbor_fraction"] = (soft / result.counts.num_reference).numpy()
    for prefix, counts in (("hard_count", result.counts.hard), ("power_count", result.counts.power)):
        for value, column in counts.items():
            table[f"{prefix}_{value:g}"] = column.double().cpu().numpy()
    if are_classes(queries.labels) and result.reference.labels is not None:
        by_position = dict(zip(result.reference.index.tolist(), result.reference.labels, strict=True))
        shares = []
        for label, neighbors in zip(queries.labels or [], result.neighbors.index.tolist(), strict=True):
            found = [by_position[neighbor] == label for neighbor in neighbors if neighbor >= 0]
            shares.append(sum(found) / len(found) if found else np.nan)
        table["same_class_fraction"] = np.asarray(shares, dtype=np.float64)
    for name, means in (("same_class_similarity", result.same_class), ("other_class_similarity", result.other_class)):
        if means is not None:
            table[name] = means.double().numpy()
    table["gradient_norm"] = result.norm.double().numpy()
    table["rank"] = result.rank.numpy()
    return table


def _neighbors(found: KernelNeighborsResult, queries: SampleSet, reference: SampleSet) -> pd.DataFrame:
    """Return the long form: one row for each query and rank."""
    number, k = found.index.shape
    present = (found.index >= 0).flatten().numpy()
    table = pd.DataFrame(
        {
            "index": queries.index.repeat_interleave(k).numpy()[present],
            "rank": torch.arange(1, k + 1).repeat(number).numpy()[present],
            "neighbor": found.index.flatten().numpy()[present],
            "similarity": found.similarity.double().flatten().numpy()[present],
        }
    )
    if reference is not queries and reference.labels is not None:
        labels = dict(zip(reference.index.tolist(), reference.labels, strict=True))
        table["neighbor_label"] = [labels[neighbor] for neighbor in table["neighbor"]]
    return table


def _meta(result: SimilarityResult, settings: SweepSettings) -> dict[str, Any]:
    directions = Directions(settings.directions, settings.seed)
    parameters = settings.parameters if isinstance(settings.parameters, str) else list(settings.parameters)
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {name: _version(package) for name, package in _PACKAGES.items()},
        "num_samples": len(result.queries.index),
        "num_reference": result.counts.num_reference,
        "num_left_out": result.num_left_out,
        "parameters": parameters,
        "directions": {"kind": directions.kind, "count": result.num_directions, "seed": settings.seed},
        "precision": str(result.norm.dtype).removeprefix("torch."),
        "plan": result.plan,
        "k": settings.k,
        "recall": result.neighbors.recall,
        "similarity_error": result.similarity_error,
        "count_errors": {
            **{f"hard_count_{tau:g}": error for tau, error in result.counts.hard_error.items()},
            **{f"power_count_{alpha:g}": error for alpha, error in result.counts.power_error.items()},
        },
        "sweep_disagreement": result.sweep_disagreement,
        "notes": list(result.notes),
        "seconds": result.seconds,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
