"""Show what was found for single samples: their neighbors, and what else moves if one of them is corrected."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lightning_netsim.records.record import Record
from lightning_netsim.records.view import RecordView, SampleView, shorten
from lightning_netsim.report import style
from lightning_netsim.report.figures import Figure
from lightning_netsim.report.issues import WIDTH
from lightning_netsim.report.pictures import Thumbnails, thumbnail_of


def format_neighbors(record: Record) -> str:
    """Describe the neighbors of every sample of a record as text: one table for each sample."""
    view, meta = RecordView(record), record.meta
    directions = meta["directions"]
    number = f"{len(view.samples)} sample" + "s" * (len(view.samples) > 1)
    head = f"{number}, compared exactly with {view.num_reference:,} of {view.reference}"
    parts = [head, f"outputs: {directions['kind']} ({directions['count']})", f"took {meta['seconds']:.1f} s"]
    lines = ["Kernel neighbors" + (f" · {view.title()}" if view.title() else ""), "─" * WIDTH]
    lines += textwrap.wrap(" · ".join(parts), WIDTH)
    for index in view.samples["index"]:
        lines += ["", _caption(view, view.sample(int(index)))]
        rows = [
            {
                "rank": rank,
                "neighbor": shorten(neighbor.name, 30),
                "similarity": f"{neighbor.similarity:.4f}",
                "label": "" if neighbor.label is None else ("≠ " if neighbor.agrees is False else "") + neighbor.label,
            }
            for rank, neighbor in enumerate(view.neighbors(int(index)), 1)
        ]
        if rows:
            table = pd.DataFrame(rows)
            lines += _indented(table if any(table["label"]) else table.drop(columns="label"))
    lines += ["", *(textwrap.fill(note, WIDTH) for note in meta["notes"])]
    return "\n".join([*lines, "Similarity 1: the same input to the network. ≠ marks another label than the sample's."])


def _caption(view: RecordView, sample: SampleView) -> str:
    """Return what is known of a sample, on one line."""
    parts = [f"Sample {shorten(sample.name, 40)}"]
    if sample.label is not None:
        parts.append(f"label {sample.label}")
    if sample.prediction is not None:
        parts.append(f"predicted {sample.prediction}" + (" ≠" if sample.is_wrong else ""))
    if sample.count != sample.count:
        return " · ".join([*parts, "left out: its gradient is zero or not finite"])
    counted = f"soft count {sample.count:,.1f} of {view.num_reference:,} (fraction {sample.fraction:.3f})"
    return " · ".join([*parts, counted])


def _indented(table: pd.DataFrame) -> list[str]:
    return ["  " + line for line in table.to_string(index=False).splitlines()]


def class_name(label: Any, names: Sequence[str] | None) -> str:
    """Return the name of a class, or the label itself where it has none."""
    known = names is not None and isinstance(label, int) and 0 <= label < len(names)
    return str(names[label]) if names is not None and known else str(label)


def format_transfer(meta: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    """Describe what else moves if a sample is corrected.

    Args:
        meta: what the tables were made with: query, label, prediction, change, along, length, num_reference, ...
        tables: title -> the samples to show under it.
    """
    names = meta["class_names"]
    known = [f"{key} {class_name(meta[key], names)}" for key in ("label", "prediction") if meta.get(key) is not None]
    lines = [_title(meta) + (f" ({', '.join(known)})" if known else ""), "─" * WIDTH]
    applied = f" It was applied to {meta['num_reference']:,} samples of {meta['reference']} in {meta['seconds']:.1f} s."
    lines += textwrap.wrap(_change(meta) + applied, WIDTH)
    for title, table in tables.items():
        shown = table.copy()
        for column in shown:
            if column in ("label", "prediction"):
                shown[column] = [class_name(value, names) for value in shown[column]]
            elif shown[column].dtype.kind == "f":
                shown[column] = [f"{value:.4f}" for value in shown[column]]
        lines += ["", title, *(_indented(shown) if len(shown) else ["  none"])]
    reading = (
        "moved: how far the outputs of a sample go, to first order. along: their part along v (1 = as far as the corrected "
        "sample is to go, negative = the other way)."
    )
    if any("margin" in table for table in tables.values()):
        reading += " margin: the output of its label less the strongest other one, and how that changes."
    return "\n".join([*lines, "", *textwrap.wrap(reading, WIDTH)])


def _title(meta: Mapping[str, Any]) -> str:
    return f"What else moves if sample {meta['query']} is corrected"


def _change(meta: Mapping[str, Any]) -> str:
    """Return the sentences on the change itself."""
    change, names = meta["change"], meta["class_names"]
    largest = sorted(range(len(change)), key=lambda output: -abs(change[output]))[:4]
    parts = [f"{class_name(output, names)} by {change[output]:+.3g}" for output in largest if change[output]]
    more = " and others less" if sum(map(bool, change)) > len(parts) else ""
    text = f"v moves output {', '.join(parts)}{more}. The least change of the parameters that does it has length "
    text += f"{meta['length']:.3g}."
    if abs(meta["along"] - 1) > 1e-3:
        text += f" The outputs of the sample depend on each other: it moves by {meta['along']:.3g} of v only."
    return text


def plot_transfer(
    meta: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    thumbnails: Thumbnails | None,
    reference_thumbnails: Thumbnails | None,
) -> Figure:
    """Draw the corrected sample, and rows of the samples that move with it.

    Args:
        meta: see `format_transfer`.
        tables: likewise.
        thumbnails: gives the picture or text of the corrected sample.
        reference_thumbnails: the same for the samples that move.
    """
    side, gap, top, left = 0.84, 0.1, 1.5, 1.7
    columns = max([1, *(min(len(table), 10) for table in tables.values())])
    width, pitch = left + columns * (side + gap) + 0.2, side + 0.75
    with style.styled():
        reading = f"{_change(meta)} Above each sample: how far it moves along v (1 = as far as the corrected one)"
        reading += ", or how its margin changes." if any("margin" in table for table in tables.values()) else "."
        figure = style.new_figure(max(width, 8.6), top + max(1, len(tables)) * pitch, _title(meta), reading)
        canvas = style.add_canvas(figure)
        known = {"index": meta["query"], **{key: meta[key] for key in ("label", "prediction") if meta[key] is not None}}
        _draw(canvas, thumbnails, meta["query"], (0.35, top, side, side), _under(known, meta["class_names"]), style.INK)
        for number, (name, table) in enumerate(tables.items()):
            line = top + number * pitch
            shown = "margin_change" if "margin" in name.lower() else "along"
            canvas.text(left, line - 0.3, name, fontsize=9, fontweight="bold", color=style.GRADIENT)
            for column, row in enumerate(table.head(columns).to_dict("records")):
                box = (left + column * (side + gap), line, side, side)
                _draw(canvas, reference_thumbnails, int(row["index"]), box, _under(row, meta["class_names"]), style.RULE)
                canvas.text(box[0] + side / 2, line - 0.09, f"{row[shown]:+.3f}", ha="center", va="center", fontsize=8)
    return figure


def _under(row: Mapping[str, Any], names: Sequence[str] | None) -> str:
    if "label" not in row:
        return f"#{row['index']}"
    label, prediction = (class_name(row[key], names) for key in ("label", "prediction"))
    return label if label == prediction else f"{label} ≠ {prediction}"


def _draw(
    canvas: Any, thumbnails: Thumbnails | None, index: int, box: tuple[float, float, float, float], under: str, color: str
) -> None:
    style.draw_thumbnail(canvas, thumbnail_of(thumbnails, index), box, empty=f"#{index}")
    style.frame(canvas, box, color, 1.0)
    canvas.text(box[0] + box[2] / 2, box[1] + box[3] + 0.11, shorten(under, 16), ha="center", va="center", fontsize=8)
