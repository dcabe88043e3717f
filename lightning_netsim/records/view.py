"""Read a record the way every report shows it: names of classes, extremes, neighbors that agree or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lightning_netsim._checks import check_positive_int, expected
from lightning_netsim.data.labels import label_kind
from lightning_netsim.records.record import Record


@dataclass(frozen=True)
class NeighborView:
    """One neighbor of a sample: `agrees` is whether it has the sample's label, None where either label is unknown."""

    index: int
    name: str
    similarity: float
    label: str | None
    agrees: bool | None


@dataclass(frozen=True)
class SampleView:
    """One query sample; `count` and `fraction` are NaN where it was left out, names None where unknown."""

    index: int
    name: str
    label: str | None
    prediction: str | None
    count: float
    fraction: float

    @property
    def is_wrong(self) -> bool:
        """Return whether the prediction is known to differ from the label."""
        return self.label is not None and self.prediction is not None and self.label != self.prediction


class RecordView:
    """A record, indexed for showing.

    Args:
        record: what to show.

    Attributes:
        samples: the record's samples, by their `index`.
        ranked: those with a count, from the most isolated to the most crowded; ties by index.
        num_reference: N, the number of reference samples.
        num_left_out: number of samples without a count.
        label_kind: what the labels are, see `label_kind`.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.samples = record.samples.drop_duplicates("index").set_index("index", drop=False)
        finite = self.samples[np.isfinite(self.samples["soft_count"]) & np.isfinite(self.samples["neighbor_fraction"])]
        self.ranked = finite.rename_axis(None).sort_values(["neighbor_fraction", "index"])
        self.num_left_out = int(record.meta.get("num_left_out") or 0) or len(self.samples) - len(self.ranked)
        self.reference = str(record.meta.get("reference") or "self")
        self.num_reference = int(record.meta.get("num_reference") or len(self.ranked))
        self.label_kind = label_kind(self.samples["label"].tolist() if self.has_labels else None)

    @property
    def has_labels(self) -> bool:
        """Return whether the samples have labels."""
        return "label" in self.samples

    @property
    def is_classified(self) -> bool:
        """Return whether the labels name classes (integers or strings), not quantities."""
        return self.label_kind in ("class", "name")

    @property
    def has_predictions(self) -> bool:
        """Return whether the samples have predictions."""
        return "prediction" in self.samples

    def class_name(self, label: object) -> str | None:
        """Return the name of a label, or of a prediction; None where it is missing."""
        if label is None or (isinstance(label, float) and math.isnan(label)):
            return None
        names = self.record.meta.get("class_names")
        if isinstance(names, Mapping):
            return str(names.get(label, names.get(str(label), label)))
        if isinstance(names, Sequence) and not isinstance(names, str) and isinstance(label, (int, np.integer)):
            return str(names[int(label)]) if 0 <= label < len(names) else str(label)
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def sample(self, index: int) -> SampleView:
        """Return the sample of the given index."""
        if index not in self.samples.index:
            raise expected("queries", "indices of samples in the record", str(index))
        label = self.class_name(self._value("label", index)) if self.has_labels else None
        prediction = self.class_name(self._value("prediction", index)) if self.has_predictions else None
        count, fraction = float(self._value("soft_count", index)), float(self._value("neighbor_fraction", index))
        return SampleView(int(index), str(self._value("sample_id", index)), label, prediction, count, fraction)

    def _value(self, column: str, index: int) -> Any:
        """Return one entry in its column's own type, which a whole row, made of one type, would lose."""
        return self.samples[column].loc[index]

    def isolated(self, number: int) -> list[SampleView]:
        """Return the samples with the fewest soft neighbors, the most isolated first."""
        return [self.sample(index) for index in self.ranked["index"].head(number)]

    def crowded(self, number: int) -> list[SampleView]:
        """Return the samples with the most soft neighbors, the most crowded first."""
        return [self.sample(index) for index in self.ranked["index"].tail(number)[::-1]]

    def spread(self, number: int) -> list[int]:
        """Return the indices of samples evenly spread by rank, from the most isolated to the most crowded."""
        check_positive_int("num_rows", number)
        positions = np.unique(np.linspace(0, len(self.ranked) - 1, min(number, len(self.ranked))).round().astype(int))
        return [int(self.ranked["index"].iloc[position]) for position in positions]

    def neighbors(self, index: int, activations: bool = False) -> list[NeighborView]:
        """Return the neighbors of a sample, nearest first, under the gradient kernel or under activations."""
        table = self.record.activation_neighbors if activations else self.record.neighbors
        if table is None:
            return []
        table = table[(table["index"] == index) & (table["neighbor"] >= 0) & np.isfinite(table["similarity"])]
        table = table.sort_values("rank")
        own = self.samples["label"].get(index) if self.has_labels else None
        labels = table["neighbor_label"] if "neighbor_label" in table else [None] * len(table)
        neighbors = []
        for other, similarity, label in zip(table["neighbor"], table["similarity"], labels, strict=True):
            known = self.reference == "self" and other in self.samples.index
            if label is None and known and self.has_labels:
                label = self._value("label", other)
            name = self.class_name(label)
            comparable = self.is_classified and name is not None and self.class_name(own) is not None
            agrees = bool(label == own) if comparable else None
            identity = str(self._value("sample_id", other)) if known else str(int(other))
            neighbors.append(NeighborView(int(other), identity, float(similarity), name, agrees))
        return neighbors

    def by_class(self) -> pd.DataFrame:
        """Return the neighbor fraction by class: columns name, samples, mean, min, max, sorted by label."""
        if not self.is_classified:
            return pd.DataFrame(columns=["name", "samples", "mean", "min", "max"])
        grouped = self.ranked.groupby("label")["neighbor_fraction"].agg(["size", "mean", "min", "max"]).sort_index()
        grouped = grouped.rename(columns={"size": "samples"})
        grouped.insert(0, "name", [str(self.class_name(label)) for label in grouped.index])
        return grouped.reset_index(drop=True)

    def history_row(self) -> dict[str, float]:
        """Return this record's row of the history that `plot_counts_over_epochs` draws: epoch, mean, q10, ..., classes."""
        fraction = self.ranked["neighbor_fraction"]
        row = {"epoch": float(self.record.meta.get("epoch") or 0), "mean": float(fraction.mean())}
        for name, quantile in (("min", 0.0), ("q10", 0.1), ("median", 0.5), ("q90", 0.9), ("max", 1.0)):
            row[name] = float(fraction.quantile(quantile))
        table = self.by_class()
        for name, mean in zip(table["name"], table["mean"], strict=True):
            row[f"class {name}" if name in row else str(name)] = float(mean)
        return row

    def compared(self) -> str:
        """Return how many samples were compared with what."""
        reference = "each other" if self.reference == "self" else f"{self.num_reference:,} of {self.reference}"
        return f"{len(self.samples):,} samples compared with {reference}"

    def title(self) -> str:
        """Return when the record was made, for the head of a figure or page: stage, epoch, step."""
        meta = self.record.meta
        names = {"stage": "", "epoch": "epoch ", "global_step": "step "}
        return ", ".join(f"{words}{meta[key]}" for key, words in names.items() if meta.get(key) is not None)


def shorten(text: object, width: int) -> str:
    """Return `text` on one line of at most `width` characters, cut in the middle, where names tend to differ least.

    >>> shorten("images/val/00000012.jpg", 12)
    'images…2.jpg'
    """
    line = " ".join(str(text).split())
    if len(line) <= width:
        return line
    tail = max((width - 1) // 2, 0)
    return line[: max(width - 1 - tail, 0)].rstrip() + "…" + (line[-tail:].lstrip() if tail else "")


def decimals(step: float, most: int = 6) -> int:
    """Return how many decimals tell numbers apart that differ by `step`.

    >>> decimals(0.024), decimals(42.0)
    (2, 0)
    """
    return min(max(math.ceil(-math.log10(step)), 0), most) if step > 0 else most
