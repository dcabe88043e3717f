"""What is wrong with a data set, as its network's kernel shows it: labels, near-duplicates, outliers, hard samples, leaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lightning_netsim._checks import check_choice, check_positive_number, expected
from lightning_netsim.functional import label_quality, neighbor_label_shares
from lightning_netsim.records import Record, newest_record
from lightning_netsim.report.issues import format_issues
from lightning_netsim.report.view import RecordView

Array = npt.NDArray[Any]

ISSUES = ("label", "near_duplicate", "outlier", "hard", "leak")
#: Each in units of the data set's own median of what it compares, see `find_issues`.
THRESHOLDS = {"label": 0.5, "value_label": 6.0, "near_duplicate": 0.5, "outlier": 2.0, "hard": 0.2, "leak": 0.5}


@runtime_checkable
class HasRecord(Protocol):
    """What holds a record: a `SimilarityAnalysis`, a `SimilarityMonitor` after an epoch."""

    record: Record


@dataclass(frozen=True, eq=False)
class IssueReport:
    """The issues of a data set.

    Attributes:
        table: one row for each sample: `sample_id`, `index`, `label` and `suggested_label` where there are labels, and for each
            issue `is_<issue>_issue` and `<issue>_score` in [0, 1], where lower is worse and NaN is a sample that was left out;
            `near_duplicate_set`, the number of the set that a sample is in, -1 for none.
        issues: which issues were looked for.
        skipped: why the others were not.
        medians: what the thresholds are relative to.
        class_names: names of the classes.
    """

    table: pd.DataFrame
    issues: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    class_names: Sequence[str] | None = None

    def __str__(self) -> str:
        return format_issues(self.table, self.issues, self.skipped, self.class_name)

    def __repr__(self) -> str:
        return f"IssueReport({', '.join(f'{name}: {len(self.found(name))}' for name in self.issues)})"

    def found(self, issue: str) -> pd.DataFrame:
        """Return the rows of the samples with an issue, worst first.

        Raises:
            ValueError: for an issue that was not looked for.
        """
        rows = self.table[self.table[f"is_{self._check(issue)}_issue"]]
        return rows.sort_values(f"{issue}_score", kind="stable").reset_index(drop=True)

    def ranked(self, issue: str) -> list[int]:
        """Return the indices of all samples with a score, worst first.

        Raises:
            ValueError: for an issue that was not looked for.
        """
        scored = self.table[self.table[f"{self._check(issue)}_score"].notna()]
        return [int(index) for index in scored.sort_values(f"{issue}_score", kind="stable")["index"]]

    @property
    def near_duplicate_sets(self) -> list[list[int]]:
        """Return the sets of near-duplicates: lists of indices, the largest set first."""
        if "near_duplicate_set" not in self.table:
            return []
        members = self.table[self.table["near_duplicate_set"] >= 0]
        return [[int(index) for index in rows] for _, rows in members.groupby("near_duplicate_set")["index"]]

    def later_duplicates(self) -> set[int]:
        """Return the indices of all but the first of each set of near-duplicates."""
        return {index for members in self.near_duplicate_sets for index in members[1:]}

    def class_name(self, label: Any) -> str:
        """Return the name of a class."""
        if self.class_names is not None and isinstance(label, (int, np.integer)) and 0 <= label < len(self.class_names):
            return str(self.class_names[int(label)])
        return "" if label is None or label is pd.NA else f"{label:.4g}" if isinstance(label, float) else str(label)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, as CSV or Parquet by the ending of the name."""
        place = Path(path)
        writers: dict[str, Callable[..., Any]] = {".csv": self.table.to_csv, ".parquet": self.table.to_parquet}
        if place.suffix not in writers:
            raise expected("path", "a name that ends in .csv or .parquet", repr(str(path)))
        writers[place.suffix](place, index=False)
        return place

    def _check(self, issue: str) -> str:
        if issue in self.skipped:
            raise expected("issue", "one that was looked for", repr(issue), self.skipped[issue])
        return check_choice("issue", issue, self.issues)


def find_issues(
    run: Record | HasRecord | str | os.PathLike[str],
    issues: Iterable[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> IssueReport:
    """Find the issues of the samples of a run, from its tables alone.

    With d = √(2(1 − k)), the distance of the unit gradients of two samples, and every threshold t relative to the data set:

    - "label": the score is √(s p), s the share of the label among the neighbors (`neighbor_label_shares`), p the probability
      that the network gives to it; suspect below t times the median. Labels that are values: m / (m + r) with r the distance
      of the label from the mean of the neighbors' labels and m its median; suspect where r > t m ("value_label").
      `suggested_label` is the class of most neighbors, or their mean.
    - "near_duplicate": d / (d + m), d to the nearest neighbor and m its median; a pair with d < t m is one, and sets are
      what such pairs connect.
    - "leak", where the samples were compared with another set: the same, to the nearest sample of that set.
    - "outlier": m / (m + d), d the mean distance to the neighbors and m its median; where d > t m.
    - "hard": the difference of the two largest probabilities; below t times its median.

    Args:
        run: a run's log directory, a record, or what holds one: a `SimilarityAnalysis`, a `SimilarityMonitor`.
        issues: which to look for; None for all that there can be: labels and probabilities may be missing.
        thresholds: t of some issues, > 0, in the place of `THRESHOLDS`.

    Returns:
        one table, in cleanlab's names of columns.

    Raises:
        ValueError: if there is no record, a name is unknown, or an issue that was asked for cannot be looked for.

    Source: the label score after Charpiat et al., NeurIPS 2019, section 5; names of columns as in cleanlab.

    Example:
        >>> from lightning_netsim import analyze
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> report = find_issues(analyze(torch.nn.Linear(3, 2), loader, k=3, progress=False))
        >>> report.issues
        ('label', 'near_duplicate', 'outlier', 'hard')
    """
    levels = dict(THRESHOLDS)
    for name, value in (thresholds or {}).items():
        levels[check_choice("thresholds", name, THRESHOLDS)] = check_positive_number(f"thresholds[{name!r}]", value)
    asked = None if issues is None else [check_choice("issues", name, ISSUES) for name in issues]
    record = run.record if isinstance(run, HasRecord) else run if isinstance(run, Record) else newest_record(run)
    finder = _Finder(record, levels)
    names = [name for name in ISSUES if name not in finder.skipped and (asked is None or name in asked)]
    refused = [name for name in asked or [] if name in finder.skipped]
    if refused:
        raise expected("issues", "ones that this run tells of", repr(refused[0]), finder.skipped[refused[0]])
    for name in names:
        finder.find(name)
    return IssueReport(
        pd.DataFrame(finder.columns),
        tuple(names),
        {name: reason for name, reason in finder.skipped.items() if asked is None},
        finder.medians,
        record.meta.get("class_names"),
    )


class _Finder:
    """The columns of a report, issue by issue."""

    def __init__(self, record: Record, levels: Mapping[str, float]) -> None:
        self.levels = levels
        self.samples = record.samples.reset_index(drop=True)
        self.view = RecordView(record)
        self.compares_with_itself = self.view.reference == "self"
        self.similarity, self.neighbor, self.neighbor_labels = _wide(record, self.samples, self.compares_with_itself)
        # Rounding may bring k above 1.
        self.distance = np.sqrt(2 * np.clip(1 - self.similarity, 0, None))
        self.columns: dict[str, Any] = {"sample_id": self.samples["sample_id"], "index": self.samples["index"]}
        if self.view.has_labels:
            self.columns["label"] = self.samples["label"]
        self.medians: dict[str, float] = {}
        self.skipped = self._skip()

    def find(self, name: str) -> None:
        """Add the columns of one issue."""
        score, flagged = getattr(self, f"_{name}")()
        self.columns[f"is_{name}_issue"] = flagged & np.isfinite(score)
        self.columns[f"{name}_score"] = score

    def _skip(self) -> dict[str, str]:
        """Return why some issues cannot be looked for."""
        reasons = {}
        if not self.view.has_labels:
            reasons["label"] = "The samples have no labels."
        elif self.neighbor_labels is None:
            reasons["label"] = "The neighbors have no labels."
        if "margin" not in self.samples:
            reasons["hard"] = "The outputs are not scores of classes, or the run is of an earlier version."
        if self.compares_with_itself:
            reasons["leak"] = "The samples were compared with each other: compare them with the training set."
        else:
            reasons["near_duplicate"] = "The samples were compared with another set: compare them with each other."
        return reasons

    def _label(self) -> tuple[Array, Array]:
        find = self._class_label if self.view.is_classified else self._value_label
        return find(self.samples["label"].to_numpy(), np.asarray(self.neighbor_labels))

    def _class_label(self, labels: Array, near: Array) -> tuple[Array, Array]:
        present = np.isfinite(self.similarity)
        classes = np.unique(np.concatenate([labels, near[present]]))
        codes = np.where(present, np.searchsorted(classes, np.where(present, near, classes[0])), -1)
        shares = neighbor_label_shares(torch.tensor(codes), torch.tensor(self.similarity), len(classes))
        probability = self.samples.get("label_probability")
        known = None if probability is None else torch.tensor(probability.to_numpy(dtype=np.float64))
        score = label_quality(torch.tensor(np.searchsorted(classes, labels)), shares, known).numpy()
        score = np.where(present.any(1), score, np.nan)
        self.columns["suggested_label"] = classes[shares.argmax(1).numpy()]
        self.medians["label"] = _median(score)
        return score, score < self.levels["label"] * self.medians["label"]

    def _value_label(self, labels: Array, near: Array) -> tuple[Array, Array]:
        weight = np.clip(np.nan_to_num(self.similarity), 0, None)
        total = weight.sum(1)
        mean = np.divide(
            (weight * np.nan_to_num(near.astype(np.float64))).sum(1), total, where=total > 0, out=np.full(len(total), np.nan)
        )
        self.columns["suggested_label"] = mean
        return self._far("value_label", np.abs(labels - mean))

    def _near_duplicate(self) -> tuple[Array, Array]:
        score, flagged = self._near("near_duplicate")
        limit = self.levels["near_duplicate"] * self.medians["near_duplicate"]
        rows, places = np.nonzero(self.distance < limit)
        position = {int(index): row for row, index in enumerate(self.samples["index"])}
        pairs = [(int(row), position[int(self.neighbor[row, place])]) for row, place in zip(rows, places, strict=True)]
        sets = _connected(len(self.samples), pairs)
        self.columns["near_duplicate_set"] = sets
        return score, flagged | (sets >= 0)

    def _leak(self) -> tuple[Array, Array]:
        return self._near("leak")

    def _near(self, name: str) -> tuple[Array, Array]:
        nearest = self.distance[:, 0]
        median = self.medians[name] = _median(nearest)
        return _ratio(nearest, median), nearest < self.levels[name] * median

    def _outlier(self) -> tuple[Array, Array]:
        present = np.isfinite(self.distance)
        number = present.sum(1)
        mean = np.where(number > 0, np.where(present, self.distance, 0).sum(1) / np.maximum(number, 1), np.nan)
        return self._far("outlier", mean)

    def _far(self, name: str, values: Array) -> tuple[Array, Array]:
        median = self.medians[name] = _median(values)
        return 1 - _ratio(values, median), values > self.levels[name] * median

    def _hard(self) -> tuple[Array, Array]:
        margin = self.samples["margin"].to_numpy(dtype=np.float64)
        self.medians["hard"] = _median(margin)
        return margin, margin < self.levels["hard"] * self.medians["hard"]


def _wide(record: Record, samples: pd.DataFrame, same: bool) -> tuple[Array, Array, Array | None]:
    """Return similarities, indices and labels of the neighbors, shape (N, k) each; NaN and -1 where there is none."""
    table = record.neighbors
    k = int(table["rank"].max()) if len(table) else 1
    rows = pd.Series(np.arange(len(samples)), index=samples["index"]).reindex(table["index"]).to_numpy()
    places = (rows, table["rank"].to_numpy() - 1)
    similarity, neighbor = np.full((len(samples), k), np.nan), np.full((len(samples), k), -1)
    similarity[places], neighbor[places] = table["similarity"], table["neighbor"]
    if same and "label" in samples:
        found = pd.Series(samples["label"].to_numpy(), index=samples["index"]).reindex(table["neighbor"]).to_numpy()
    elif "neighbor_label" in table:
        found = table["neighbor_label"].to_numpy()
    else:
        return similarity, neighbor, None
    labels = np.empty((len(samples), k), dtype=found.dtype)
    labels[places] = found
    return similarity, neighbor, labels


def _median(values: Array) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _ratio(values: Array, median: float) -> Array:
    """Return values / (values + median): 1/2 at the median; 1/2 for all if everything is 0."""
    total = values + median
    return np.where(total > 0, values / np.where(total > 0, total, 1), np.where(np.isnan(values), np.nan, 0.5))


def _connected(number: int, pairs: Iterable[tuple[int, int]]) -> Array:
    """Return the number of the set that each of N samples is in, the largest set first; -1 for one by itself."""
    parent = list(range(number))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in pairs:
        parent[max(root(one), root(other))] = min(root(one), root(other))
    roots = np.array([root(node) for node in range(number)], dtype=np.int64)
    found, size = np.unique(roots, return_counts=True)
    several = sorted((found[place] for place in np.flatnonzero(size > 1)), key=lambda first: (-size[found == first][0], first))
    names = {first: place for place, first in enumerate(several)}
    return np.array([names.get(first, -1) for first in roots], dtype=np.int64)
