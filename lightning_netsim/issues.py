"""What is wrong with a data set, as its network's kernel shows it: labels, near-duplicates, outliers, hard samples, leaks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lightning_netsim._checks import check_choice, check_positive_number, check_writable, expected
from lightning_netsim.functional import expected_neighbors, label_quality, label_votes, neighbor_dimension, neighbor_radius
from lightning_netsim.functional.label_quality import rank_weights
from lightning_netsim.records import Record, newest_record
from lightning_netsim.report.html import text_and_figure
from lightning_netsim.report.issue_figures import plot_issues
from lightning_netsim.report.issues import format_issues
from lightning_netsim.report.pictures import Thumbnails
from lightning_netsim.report.view import RecordView

Array = npt.NDArray[Any]

ISSUES = ("label", "near_duplicate", "outlier", "hard", "leak")
# With two neighbors, a dimension is read off one ratio of distances.
_FEWEST_NEIGHBORS = 3
# Where the distances of most samples are equal, nothing but a copy is to stand out.
_MOST_DIMENSIONS = 100.0
#: A score below this is an issue; `find_issues` says what the scores are relative to.
THRESHOLDS = {"label": 1 / 2, "value_label": 1 / 7, "near_duplicate": 1e-3, "outlier": 1 / 20, "hard": 1 / 6, "leak": 1e-3}


@runtime_checkable
class HasRecord(Protocol):
    """What holds a record: a `SimilarityAnalysis`, a `SimilarityMonitor` after an epoch."""

    record: Record | None


@dataclass(frozen=True, eq=False)
class IssueReport:
    """The issues of a data set.

    Attributes:
        table: one row for each sample: `sample_id`, `index`, `label` and `suggested_label` where there are labels, and for each
            issue `is_<issue>_issue` and `<issue>_score` in [0, 1], lower is worse, NaN where a sample was left out;
            `near_duplicate_set`, the number of the set that a sample is in, -1 for none.
        issues: which issues were looked for.
        skipped: why the others were not.
        scales: what the scores are relative to: medians, and the dimension of the data set.
        name_of: gives the name of a class.
        has_names: whether that is another than the label.
        pictures: gives what a person sees of the sample of an index; None for a run that was loaded from disk.
    """

    table: pd.DataFrame
    issues: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    name_of: Callable[[Any], str | None] = str
    has_names: bool = False
    pictures: Thumbnails | None = None

    def __str__(self) -> str:
        return format_issues(self.table, self.issues, self.skipped, self.class_name)

    def __repr__(self) -> str:
        return f"IssueReport({', '.join(f'{name}: {len(self.found(name))}' for name in self.issues)})"

    def _repr_html_(self) -> str:
        return text_and_figure(str(self), self.plot())

    def plot(self, columns: int = 10) -> Any:
        """Return a matplotlib figure: the worst samples of each issue that was found, a row for each."""
        return plot_issues(self.table, self.issues, self.class_name, self.pictures, columns)

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
        """Return the name of a class; nothing for a label that is missing."""
        return "" if label is None or label is pd.NA else self.name_of(label) or ""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, as CSV or Parquet by the ending of the name."""
        place = Path(path)
        check_writable("path", place.parent)
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
    issues: str | Iterable[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
    pictures: Thumbnails | None = None,
) -> IssueReport:
    """Find the issues of the samples of a run, from its tables alone.

    A score lies in [0, 1], lower is worse, and below its threshold it is an issue. With d = √(2(1 − k)), the distance of the
    unit gradients of two samples:

    - "label": ½ + ½ (V_y − max_{c ≠ y} V_c), the votes of the neighbors and of the network (`label_votes`) for the given label
      y against those for the best other class, which is `suggested_label`; an issue where that has more votes. Labels that are
      values: m / (m + r), with r the distance from the mean of the neighbors' labels, which is then `suggested_label`, and m
      its median ("value_label").
    - "near_duplicate": 1 − exp(−λ), the chance of a neighbor as near as the nearest; λ = k (d_ij / √(R_i R_j))^D counts those
      to be expected, with R the distance of the k-th neighbor and D the dimension of the data set, from the median of
      ln(d_k / d_{k/2}). Pairs of such chances are joined to sets.
    - "leak", where the samples were compared with another set: the same, of the nearest sample of that set and R_i.
    - "outlier": min(1, (m / R)^D), with m the median of R: the density of samples around it, in that around the median sample.
    - "hard": p / (p + m), p the difference of the two largest probabilities and m its median.

    The more neighbors a run has, the surer are labels: k = 30 finds more errors than k = 10.

    Args:
        run: a run's log directory, a record, or what holds one: a `SimilarityAnalysis`, a `SimilarityMonitor`.
        issues: which to look for, also as names separated by commas; None for all that there can be: labels and probabilities
            may be missing.
        thresholds: of some issues, > 0, in the place of `THRESHOLDS`.
        pictures: gives what a person sees of the sample of an index, for the figure.

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
    given = issues.split(",") if isinstance(issues, str) else issues
    asked = None if given is None else [check_choice("issues", name, ISSUES) for name in given]
    record = _record_of(run)
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
        finder.scales,
        finder.view.class_name,
        bool(record.meta.get("class_names")),
        pictures,
    )


def _record_of(run: Any) -> Record:
    """Return the record of a run."""
    record = run.record if isinstance(run, HasRecord) else run
    if isinstance(record, (str, os.PathLike)):
        return newest_record(record)
    if not isinstance(record, Record):
        wanted = "the directory of a run, or an analysis or monitor that has measured"
        raise expected("run", wanted, "one that has not measured yet" if record is None and run is not None else repr(run))
    return record


class _Finder:
    """The columns of a report, issue by issue."""

    def __init__(self, record: Record, levels: Mapping[str, float]) -> None:
        self.levels = levels
        self.samples = record.samples.reset_index(drop=True)
        self.view = RecordView(record)
        self.compares_with_itself = self.view.reference == "self"
        self.similarity, self.neighbor, self.neighbor_labels = _wide(record, self.samples, self.compares_with_itself)
        self.present = np.isfinite(self.similarity)
        # Rounding may bring k above 1.
        self.distance = torch.tensor(2 * (1 - self.similarity)).clamp_min(0).sqrt()
        self.columns: dict[str, Any] = {"sample_id": self.samples["sample_id"], "index": self.samples["index"]}
        if self.view.has_labels:
            self.columns["label"] = self.samples["label"]
        self.scales: dict[str, float] = {}
        self.skipped = self._skip()

    def find(self, name: str) -> None:
        """Add the columns of one issue."""
        finders = {
            "label": self._class_label if self.view.is_classified else self._value_label,
            "near_duplicate": self._near_duplicate,
            "outlier": self._outlier,
            "hard": self._hard,
            "leak": self._leak,
        }
        score = finders[name]()
        level = self.levels["value_label" if name == "label" and not self.view.is_classified else name]
        self.columns[f"is_{name}_issue"] = score < level
        self.columns[f"{name}_score"] = score

    def _skip(self) -> dict[str, str]:
        """Return why some issues cannot be looked for."""
        reasons = {}
        if not self.view.has_labels:
            reasons["label"] = "The samples have no labels."
        elif self.neighbor_labels is None:
            reasons["label"] = "The neighbors have no labels."
        elif _kind(self.neighbor_labels[self.present]) != _kind(self.samples["label"].to_numpy()) and self.present.any():
            reasons["label"] = "The labels of the neighbors are of another type than those of the samples."
        if "margin" not in self.samples:
            reasons["hard"] = "The outputs are not scores of classes, or the run is of an earlier version."
        if self.similarity.shape[1] < _FEWEST_NEIGHBORS:
            few = f"It takes at least {_FEWEST_NEIGHBORS} neighbors of each sample: measure with a larger k."
            reasons |= dict.fromkeys(("near_duplicate", "outlier", "leak"), few)
        elif self.compares_with_itself:
            reasons["leak"] = "The samples were compared with each other: compare them with the training set."
        else:
            reasons["near_duplicate"] = "The samples were compared with another set: compare them with each other."
        return reasons

    def _class_label(self) -> Array:
        """Return the scores of labels that are classes, and put in the labels that have most votes."""
        given, near = self.samples["label"].to_numpy(), np.asarray(self.neighbor_labels)
        classes = sorted({*given.tolist(), *near[self.present].tolist()})
        code = {label: place for place, label in enumerate(classes)}
        labels = torch.tensor([code[label] for label in given.tolist()])
        neighbors = torch.full(near.shape, -1)
        neighbors[torch.tensor(self.present)] = torch.tensor([code[label] for label in near[self.present].tolist()]).long()
        predictions = self._predictions()
        if predictions is None:
            votes = label_votes(neighbors, len(classes))
        else:
            own = torch.tensor([code.get(label, -1) for label in predictions])
            margin = torch.tensor(self.samples["margin"].to_numpy(dtype=np.float64, copy=True))
            votes = label_votes(neighbors, len(classes), own, margin)
        score = label_quality(votes, labels).numpy()
        best = torch.where(votes.amax(1) > votes.gather(1, labels.unsqueeze(1)).squeeze(1), votes.argmax(1), labels)
        best = torch.where(torch.tensor(self.present.any(1)), best, labels)
        self.columns["suggested_label"] = [classes[place] for place in best.tolist()]
        return np.where(self.present.any(1), score, np.nan)

    def _predictions(self) -> list[Any] | None:
        """Return what the network takes the samples for, in the terms of the labels; None where that is not known."""
        if "prediction" not in self.samples or "margin" not in self.samples:
            return None
        predictions: list[Any] = self.samples["prediction"].tolist()
        named = not all(isinstance(label, int) for label in self.samples["label"].tolist())
        return [self.view.class_name(value) for value in predictions] if named else predictions

    def _value_label(self) -> Array:
        """Return the scores of labels that are values, and put in the means of the neighbors' labels."""
        near = np.asarray(self.neighbor_labels, dtype=np.float64)
        present = self.present & np.isfinite(near)
        weight = rank_weights(torch.tensor(present)).numpy()
        mean = np.where(present.any(1), (weight * np.where(present, near, 0.0)).sum(1), np.nan)
        self.columns["suggested_label"] = mean
        return self._far("value_label", np.abs(self.samples["label"].to_numpy(dtype=np.float64) - mean))

    def _near_duplicate(self) -> Array:
        """Return the chance of so near a neighbor, the least of all pairs of a sample, and put in the sets."""
        rows, places = np.nonzero(self.present)
        position = pd.Series(np.arange(len(self.samples)), index=self.samples["index"])
        partners = position.reindex(self.neighbor[rows, places]).to_numpy(copy=True)
        radius = neighbor_radius(self.distance)
        chance = self._chance(self.distance[rows, places], (radius[rows] * radius[partners]).sqrt())
        least = np.full(len(self.samples), np.inf)
        # A sample is as near to another as that is to it, whoever lists whom.
        for ends in (rows, partners):
            np.minimum.at(least, ends, chance)
        near = chance < self.levels["near_duplicate"]
        self.columns["near_duplicate_set"] = _connected(len(self.samples), rows[near], partners[near])
        return np.where(np.isfinite(least), least, np.nan)

    def _leak(self) -> Array:
        return self._chance(self.distance[:, 0], neighbor_radius(self.distance))

    def _chance(self, distance: torch.Tensor, radius: torch.Tensor) -> Array:
        """Return the chance of a neighbor within `distance` where k of them lie within `radius`."""
        dimension = self.dimension
        chance: Array = -torch.expm1(-expected_neighbors(distance, radius, self.distance.shape[1], dimension)).numpy()
        return chance

    @property
    def dimension(self) -> float:
        """Return the dimension of the data set."""
        if "dimension" not in self.scales:
            dimension = neighbor_dimension(self.distance)
            self.scales["dimension"] = 1.0 if math.isnan(dimension) else min(dimension, _MOST_DIMENSIONS)
        return self.scales["dimension"]

    def _outlier(self) -> Array:
        """Return the density of samples around each, as a share of that around the median one."""
        farthest = self.distance[:, -1].numpy()
        median = self.scales["outlier"] = _median(farthest)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(farthest > median, (median / farthest) ** self.dimension, 1.0)
        return np.where(np.isfinite(farthest), share, np.nan)

    def _far(self, name: str, values: Array) -> Array:
        """Return m / (m + values), with m the median: 1/2 there, and for all if everything is 0."""
        median = self.scales[name] = _median(values)
        return np.where(values + median > 0, median / np.where(values + median > 0, values + median, 1), values * 0 + 0.5)

    def _hard(self) -> Array:
        return 1 - self._far("hard", self.samples["margin"].to_numpy(dtype=np.float64))


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


def _kind(labels: Array) -> str:
    """Return whether labels are numbers, whole or not, or names."""
    return "names" if labels.dtype.kind in "OUST" else "values" if labels.dtype.kind == "f" else "classes"


def _median(values: Array) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _connected(number: int, ones: Array, others: Array) -> Array:
    """Return the number of the set that each of N samples is in, the largest set first; -1 for one by itself."""
    parent = list(range(number))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        parent[max(root(one), root(other))] = min(root(one), root(other))
    roots = np.array([root(node) for node in range(number)], dtype=np.int64)
    first, size = np.unique(roots, return_counts=True)
    several = [place for place in np.argsort(-size, kind="stable") if size[place] > 1]
    names = {int(first[place]): name for name, place in enumerate(several)}
    return np.array([names.get(node, -1) for node in roots.tolist()], dtype=np.int64)
