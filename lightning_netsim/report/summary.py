"""Say in the terminal what a record holds, in at most 100 columns of plain text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_netsim.records.record import Record
from lightning_netsim.records.scores import THRESHOLDS, IssueFinder
from lightning_netsim.records.view import RecordView, SampleView, shorten
from lightning_netsim.report.issues import WIDTH, align, worst_samples

_MAX_CLASSES = 20
_SUSPECTS = 5
_READING = (
    "Soft count N_S: a sample's similarities to all reference samples, summed (1 = the same input).",
    "Isolated samples may be outliers, rare cases or wrong labels; crowded ones are told apart least.",
    "≠ marks a label that differs: look there for wrong labels and for classes that are confused.",
)


def format_summary(record: Record, location: str | os.PathLike[str] | None = None) -> str:
    """Describe a record as text: the neighbor fraction, the extremes, rows of the neighbor table, and where it all lies.

    Args:
        record: what to describe.
        location: the record's directory, whose files are listed; by default `record.path`.

    Returns:
        Lines of at most 100 characters, except where a path is longer, without a final line break.
    """
    view = RecordView(record)
    place = location if location is not None else record.path
    blocks = [_head(view), _fractions(view)]
    if len(view.ranked):
        blocks += [
            _extremes(view, "Five most isolated samples (fewest neighbors)", view.isolated(5)),
            _extremes(view, "Five most crowded samples (most neighbors)", view.crowded(5)),
            _neighbors(view),
        ]
    blocks += [_quality(view), *([] if place is None else [_files(Path(place))])]
    blocks.append(["How to read this", *("  " + line for line in _READING)])
    blocks += _labels(view)
    return "\n\n".join("\n".join(block) for block in blocks)


def _head(view: RecordView) -> list[str]:
    """Return the title, and what was compared with what."""
    meta = view.record.meta
    title = "Input similarity" + (f" · {view.title()}" if view.title() else "")
    parts = [view.compared()]
    directions = meta.get("directions")
    if isinstance(directions, dict) and directions.get("kind"):
        count = directions.get("count")
        parts.append(f"outputs: {directions['kind']}" + (f" ({count})" if count else ""))
    if isinstance(meta.get("seconds"), (int, float)):
        parts.append(f"took {meta['seconds']:.1f} s")
    return [title, "─" * WIDTH, *textwrap.wrap(" · ".join(parts), WIDTH)]


def _fractions(view: RecordView) -> list[str]:
    """Return the table of the neighbor fraction, of all samples and by class."""
    lines = [f"Neighbor fraction N_S / N (soft count over the {view.num_reference:,} reference samples)"]
    fraction = view.ranked["neighbor_fraction"]
    if not len(fraction):
        return [*lines, "  no sample has a count"]
    rows = [["all", f"{len(fraction):,}", *(f"{number:.3f}" for number in (fraction.mean(), fraction.min(), fraction.max()))]]
    table = shown = view.by_class()
    if len(table) > _MAX_CLASSES:
        ordered = table.sort_values("mean", kind="stable")
        shown = pd.concat([ordered.head(_MAX_CLASSES // 2), ordered.tail(_MAX_CLASSES // 2)])
    for row in shown.to_dict("records"):
        numbers = (f"{row[key]:.3f}" for key in ("mean", "min", "max"))
        rows.append([shorten(row["name"], 40), f"{int(row['samples']):,}", *numbers])
    lines += align([["class" if len(table) else "", "samples", "mean", "min", "max"], *rows], left=1)
    hidden = len(table) - len(shown)
    return lines + ([f"  (the {len(shown)} classes of lowest and highest mean; {hidden} between them)"] if hidden else [])


def _extremes(view: RecordView, title: str, samples: Sequence[SampleView]) -> list[str]:
    """Return a table of samples with their counts; a prediction that is not the label has a "≠"."""
    names = [name for name, shown in (("label", view.has_labels), ("  prediction", view.has_predictions)) if shown]
    rows = [["sample", *names, "soft count", "fraction"]]
    for sample in samples:
        cells = [shorten(sample.name, 26)]
        if view.has_labels:
            cells.append(shorten("-" if sample.label is None else sample.label, 20))
        if view.has_predictions:
            mark = "≠ " if sample.is_wrong else "  "
            cells.append(mark + shorten("-" if sample.prediction is None else sample.prediction, 18))
        rows.append([*cells, f"{sample.count:,.1f}", f"{sample.fraction:.3f}"])
    return [title, *align(rows, left=1 + len(names))]


def _neighbors(view: RecordView) -> list[str]:
    """Return rows of the neighbor table, as many neighbors each as fit."""
    lines = ["Kernel neighbors: sample (similarity" + (", label" if view.has_labels else "") + "), nearest first"]
    heads, tails = [], []
    for index in view.spread(5):
        sample = view.sample(index)
        label = "" if sample.label is None else f" ({shorten(sample.label, 16)})"
        heads.append(f"{shorten(sample.name, 18)}{label}")
        tail = []
        for neighbor in view.neighbors(index):
            mark = "≠ " if neighbor.agrees is False else ""
            label = "" if neighbor.label is None else f", {mark}{shorten(neighbor.label, 16)}"
            tail.append(f"{shorten(neighbor.name, 18)} ({neighbor.similarity:.3f}{label})")
        tails.append(tail)
    width = max(len(head) for head in heads)
    for head, tail in zip(heads, tails, strict=True):
        lines.append(f"  {head:<{width}}  →  " + _fit(tail, WIDTH - width - 7))
    return lines


def _fit(items: Sequence[str], width: int) -> str:
    """Return as many items as fit into `width`, with an ellipsis for the rest."""
    text = ""
    for number, item in enumerate(items):
        longer = f"{text}  {item}" if text else item
        room = width if number == len(items) - 1 else width - 3
        if len(longer) > room and text:
            return text + "  …"
        text = longer
    return shorten(text, width) if text else "none"


def _labels(view: RecordView) -> list[list[str]]:
    """Return the samples whose labels are most suspect, if there are labels."""
    finder = IssueFinder(view.record, THRESHOLDS)
    if "label" in finder.skipped:
        return []
    finder.find("label")
    table = pd.DataFrame(finder.columns)
    rows = worst_samples(table, "label", lambda label: view.class_name(label) or "", _SUSPECTS)
    number = int(table["is_label_issue"].sum())
    meaning = "neighbors and network prefer another label" if view.is_classified else "far from the neighbors' labels"
    head = f"{'Five' if len(table) >= _SUSPECTS else 'The'} worst label scores (low is bad; {meaning}: {number:,} samples)"
    return [[head, *rows, "  find_issues(run) lists all, and near-duplicates, outliers and hard samples."]] if rows else []


def _quality(view: RecordView) -> list[str]:
    """Return how far to trust the tables: recall, and samples left out."""
    recall = view.record.meta.get("recall")
    k = view.record.meta.get("k")
    name = f"Recall@{k}" if k else "Recall"
    found = "not measured"
    if isinstance(recall, (int, float)):
        all_pairs = view.record.meta.get("plan", {}).get("kind") == "store"
        text = "every pair was compared" if all_pairs else "the share of true neighbors found, on random queries"
        found = f"{recall:.3f} ({text})"
    some = "no usable gradient: zero or not finite" if view.num_left_out else "every gradient was usable"
    return [f"{name} of the neighbor table: {found}", f"Samples left out: {view.num_left_out:,} ({some})"]


def _files(place: Path) -> list[str]:
    """Return where the tables and figures lie."""
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    lines = [f"Written to {place}"]
    for title, endings in (("tables", (".parquet", ".json")), ("figures", (".png", ".html"))):
        group = [name for name in names if name.endswith(endings)]
        if group:
            lines += textwrap.wrap(f"  {title:<8} " + ", ".join(group), WIDTH, subsequent_indent=" " * 11)
    return lines
