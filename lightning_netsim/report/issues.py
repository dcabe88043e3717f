"""Show what is wrong with a data set: as plain text of at most 100 columns, and as rows of suspect samples."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_netsim.records.view import shorten
from lightning_netsim.report import style
from lightning_netsim.report.pictures import Thumbnails

#: The width of every text for the terminal.
WIDTH = 100
_TITLES = {
    "label": "Labels that neighbors and network contradict",
    "near_duplicate": "Near-duplicates, in sets",
    "outlier": "Outliers: far from their neighbors",
    "hard": "Hard: the network is torn between two classes",
    "leak": "Leaks: near-duplicates of samples of the other set",
}
_CAPTIONS = {
    "label": "suspect labels",
    "near_duplicate": "near-duplicates",
    "outlier": "outliers",
    "hard": "hard samples",
    "leak": "leaks",
}
_READING = (
    "The worst samples of each issue, worst first, with their scores (0 to 1, low is bad). Suspect labels: given → suggested. "
    "Near-duplicates: a number for each set."
)
_SIDE, _GAP, _LEFT, _TOP, _BLOCK = 0.84, 0.10, 1.65, 0.92, 1.36


def format_issues(table: pd.DataFrame, issues: Sequence[str], notes: Sequence[str], class_name: Callable[[Any], str]) -> str:
    """Describe the issues of a data set: how many samples have each, and the worst ones.

    Args:
        table: see `IssueReport`.
        issues: which were looked for.
        notes: what else there is to say.
        class_name: gives the name of a label.
    """
    blocks = [[f"Issues of {len(table):,} samples", "─" * WIDTH]]
    for name in issues:
        flagged = table[table[f"is_{name}_issue"]]
        head = f"{_TITLES[name]}: {len(flagged):,} of {len(table):,} samples"
        if name == "near_duplicate" and len(flagged):
            sets = flagged["near_duplicate_set"].nunique()
            head += f", {sets:,} set{'s' * (sets > 1)}"
        blocks.append([head, *worst_samples(table, name, class_name, flagged=True)])
    blocks += [[line for text in notes for line in textwrap.wrap(text, WIDTH)]] if notes else []
    return "\n\n".join("\n".join(block) for block in blocks)


def worst_samples(
    table: pd.DataFrame, issue: str, class_name: Callable[[Any], str], number: int = 5, flagged: bool = False
) -> list[str]:
    """Return a table of the samples with the worst scores of an issue.

    Args:
        table: see `IssueReport`.
        issue: which.
        class_name: gives the name of a label.
        number: how many samples at most.
        flagged: only samples that have the issue.
    """
    rows = table[table[f"is_{issue}_issue"]] if flagged else table
    rows = rows[rows[f"{issue}_score"].notna()].sort_values(f"{issue}_score", kind="stable").head(number)
    if not len(rows):
        return []
    names = ["label"] if "label" in rows else []
    names += ["suggested_label"] if issue == "label" else ["near_duplicate_set"] if issue == "near_duplicate" else []
    cells = [["sample", *(name.replace("near_duplicate_", "").replace("_", " ") for name in names), "score"]]
    for row in rows.to_dict("records"):
        values = [str(row[name]) if name == "near_duplicate_set" else shorten(class_name(row[name]), 20) for name in names]
        cells.append([shorten(row["sample_id"], 26), *values, f"{row[f'{issue}_score']:.3f}"])
    return align(cells, left=1 + len(names))


def align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return rows of cells in columns, the first `left` of them flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in pairs]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return lines


def plot_issues(
    table: pd.DataFrame,
    issues: Sequence[str],
    class_name: Callable[[Any], str],
    thumbnails: Thumbnails | None = None,
    columns: int = 10,
) -> Figure:
    """Draw the worst samples of each issue that was found, a row for each.

    Args:
        table: see `IssueReport`.
        issues: which were looked for; one that no sample has gets no row.
        class_name: gives the name of a label.
        thumbnails: gives the picture or text of the sample of an index; without it, rows show ids.
        columns: how many samples at most.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in issues:
        flagged = table[table[f"is_{name}_issue"]]
        order = ["near_duplicate_set", "index"] if name == "near_duplicate" else [f"{name}_score"]
        if len(flagged):
            rows[name] = flagged.sort_values(order, kind="stable").head(columns).to_dict("records")
    width = max(8.6, _LEFT + columns * (_SIDE + _GAP) + 0.3)
    with style.styled():
        figure = style.new_figure(width, _TOP + max(1, len(rows)) * _BLOCK, f"Issues of {len(table):,} samples", _READING)
        canvas = style.add_canvas(figure)
        if not rows:
            canvas.text(0.25, _TOP + 0.3, "No sample has an issue.", color=style.MUTED)
        for number, (name, samples) in enumerate(rows.items()):
            top = _TOP + number * _BLOCK
            canvas.plot([0.25, width - 0.25], [top - 0.08, top - 0.08], color=style.RULE, linewidth=0.8)
            canvas.text(0.25, top + 0.42, _CAPTIONS[name], fontsize=10, fontweight="bold", va="center")
            many = int(table[f"is_{name}_issue"].sum())
            canvas.text(0.25, top + 0.64, f"{many:,} of {len(table):,}", fontsize=8.5, color=style.MUTED, va="center")
            for column, sample in enumerate(samples):
                box = (_LEFT + column * (_SIDE + _GAP), top + 0.16, _SIDE, _SIDE)
                _draw_sample(canvas, name, sample, box, class_name, thumbnails)
    return figure


def _draw_sample(
    canvas: Axes,
    issue: str,
    sample: Mapping[str, Any],
    box: tuple[float, float, float, float],
    class_name: Callable[[Any], str],
    thumbnails: Thumbnails | None,
) -> None:
    """Draw one sample with its score above and what is suspected below."""
    picture = None if thumbnails is None else thumbnails(int(sample["index"]))
    center = box[0] + box[2] / 2
    style.draw_thumbnail(canvas, picture, box, empty=shorten(f"#{sample['sample_id']}", 12))
    style.frame(canvas, box, style.RULE, 0.8)
    score = f"{sample[f'{issue}_score']:.3f}"
    canvas.text(center, box[1] - 0.075, score, ha="center", va="center", fontsize=8, color=style.MUTED)
    label = shorten(class_name(sample["label"]), 12) if "label" in sample else ""
    text, color, weight = label, style.MUTED, "normal"
    if issue == "label":
        text, color, weight = f"{label} → {shorten(class_name(sample['suggested_label']), 10)}", style.MISMATCH, "bold"
    elif issue == "near_duplicate":
        text = f"set {sample['near_duplicate_set']}" + (f": {label}" if label else "")
    canvas.text(center, box[1] + box[3] + 0.11, text, ha="center", va="center", fontsize=8.5, color=color, fontweight=weight)
