"""Draw what is wrong with a data set: suspect samples in rows, one issue after the other; and how alike its classes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_netsim.records.view import shorten
from lightning_netsim.report import style
from lightning_netsim.report.pictures import Thumbnails

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
_READING_CLASSES = (
    "Mean similarity of the samples of two classes; on the diagonal, of different samples of one. Off it, a dark square is a "
    "pair that the network hardly tells apart."
)
_SIDE, _GAP, _LEFT, _TOP, _BLOCK = 0.84, 0.10, 1.65, 0.92, 1.36
_NAMED = 30


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
    found = {name: _worst(table, name, columns) for name in issues}
    rows = {name: samples for name, samples in found.items() if samples}
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
                _draw(canvas, name, sample, box, class_name, thumbnails)
    return figure


def _worst(table: pd.DataFrame, issue: str, number: int) -> list[dict[str, Any]]:
    """Return the rows of the worst samples that have an issue; near-duplicates set by set."""
    flagged = table[table[f"is_{issue}_issue"]]
    order = ["near_duplicate_set", "index"] if issue == "near_duplicate" else [f"{issue}_score"]
    rows: list[dict[str, Any]] = flagged.sort_values(order, kind="stable").head(number).to_dict("records")
    return rows


def _draw(
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


def plot_class_similarity(matrix: pd.DataFrame, class_name: Callable[[Any], str | None]) -> Figure:
    """Draw the mean similarity of each two classes as a square of colors.

    Args:
        matrix: from `lightning_netsim.records.classes.class_matrix`.
        class_name: gives the name of a label.
    """
    number = len(matrix)
    size = min(9.0, max(4.6, 1.6 + 0.42 * number))
    with style.styled():
        figure = style.new_figure(max(size, 6.2), size + 0.2, "How alike the classes are to the network", _READING_CLASSES)
        axes = style.add_axes(figure, 1.1, 0.5, 0.6, 1.0)
        values = matrix.to_numpy(dtype=np.float64)
        image = axes.imshow(values, cmap="Blues", vmin=min(0.0, float(np.nanmin(values))), vmax=1.0)
        if number <= _NAMED:
            names = [shorten(class_name(label) or "-", 12) for label in matrix.index]
            axes.set_xticks(range(number), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(number), names)
        if number <= 12:
            for row, column in np.ndindex(number, number):
                shade = style.PAPER if values[row, column] > 0.6 else style.INK
                text = f"{values[row, column]:.2f}" if np.isfinite(values[row, column]) else "-"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    return figure
