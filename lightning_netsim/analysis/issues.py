"""What is wrong with a data set, as its network's kernel shows it: labels, near-duplicates, outliers, hard samples, leaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from lightning_netsim._checks import check_choice, check_positive_number, check_writable, expected
from lightning_netsim.records.record import Record, newest_record
from lightning_netsim.records.scores import ISSUES, THRESHOLDS, IssueFinder
from lightning_netsim.report.html import text_and_figure
from lightning_netsim.report.issues import format_issues, plot_issues
from lightning_netsim.report.pictures import Thumbnails


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
        notes: remarks for the user.
        name_of: gives the name of a class.
        has_names: whether that is another than the label.
        pictures: gives what a person sees of the sample of an index; None for a run that was loaded from disk.
    """

    table: pd.DataFrame
    issues: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name_of: Callable[[Any], str | None] = str
    has_names: bool = False
    pictures: Thumbnails | None = None

    def __str__(self) -> str:
        reasons = [f"Not looked for: {name.replace('_', ' ')}. {reason}" for name, reason in self.skipped.items()]
        return format_issues(self.table, self.issues, [*reasons, *self.notes], self.class_name)

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

    def later_duplicates(self, most: int | None = None) -> set[int]:
        """Return the indices of all but the first of each set of near-duplicates, of those with at most `most` members."""
        sets = (members for members in self.near_duplicate_sets if most is None or len(members) <= most)
        return {index for members in sets for index in members[1:]}

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
      ln(d_k / d_{k/2}). The same under activations, where the run has their neighbors: the lesser chance counts, for gradients
      of a network with kinks jump where a unit switches. Pairs of such chances are joined to sets.
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
        >>> import torch
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
    given = [name.strip() for name in issues.split(",")] if isinstance(issues, str) else issues
    asked = None if given is None else [check_choice("issues", name, ISSUES) for name in given]
    record = _record_of(run)
    finder = IssueFinder(record, levels)
    for name in asked or []:
        if name in finder.skipped:
            raise expected("issues", "ones that this run tells of", repr(name), finder.skipped[name])
    names = [name for name in ISSUES if name not in finder.skipped and (asked is None or name in asked)]
    for name in names:
        finder.find(name)
    return IssueReport(
        pd.DataFrame(finder.columns),
        tuple(names),
        {name: reason for name, reason in finder.skipped.items() if asked is None},
        finder.scales,
        tuple(finder.notes),
        finder.view.class_name,
        bool(record.meta.get("class_names")),
        pictures,
    )


def _record_of(run: Any) -> Record:
    """Return the record of a run."""
    record = run.record if isinstance(run, HasRecord) else run
    if isinstance(record, (str, os.PathLike)):
        return newest_record(record)
    if isinstance(record, Record) and record.meta.get("plan", {}).get("kind") == "queries":
        raise expected("run", "one that measured a whole set", "the neighbors of single samples", "Use `analyze`.")
    if not isinstance(record, Record):
        wanted = "the directory of a run, or an analysis or monitor that has measured"
        raise expected("run", wanted, "one that has not measured yet" if record is None and run is not None else repr(run))
    return record
