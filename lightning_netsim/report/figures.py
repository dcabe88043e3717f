"""Figures of a record: counts with a sample for each bin, rows of neighbors, counts over epochs, similarities.

After figures 4 to 8 and 13 to 15 of Charpiat et al., NeurIPS 2019, supplementary material. Every function returns a
`matplotlib.figure.Figure`; `save_figure` writes it and `figure_to_array` makes it an image for a logger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_netsim._checks import check_positive_int, expected
from lightning_netsim.records.record import Record
from lightning_netsim.records.view import NeighborView, RecordView, SampleView, decimals, shorten
from lightning_netsim.report import style
from lightning_netsim.report.pictures import Thumbnail, Thumbnails, thumbnail_of
from lightning_netsim.report.style import figure_to_array, save_figure

__all__ = [
    "Figure",
    "Thumbnails",
    "bin_representatives",
    "figure_to_array",
    "plot_count_histogram",
    "plot_counts_over_epochs",
    "plot_neighbor_rows",
    "plot_similarity_histograms",
    "save_figure",
]

_BANDS = ("epoch", "mean", "q10", "median", "q90", "min", "max")
_TITLE = 1.0  # inches kept for the title and how to read the figure


def bin_representatives(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return, for each bin, the position of the value in it that is nearest the bin's right edge; -1 for an empty bin.

    Source: Charpiat et al., NeurIPS 2019, supplementary material, figure 4.

    >>> bin_representatives(np.array([0.1, 0.4, 0.9]), np.array([0.0, 0.5, 0.8, 1.0])).tolist()
    [1, -1, 2]
    """
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    chosen = np.full(len(edges) - 1, -1, dtype=np.int64)
    order = np.argsort(-values, kind="stable")
    filled, first = np.unique(places[order], return_index=True)
    chosen[filled] = order[first]
    return chosen


def plot_count_histogram(record: Record, thumbnails: Thumbnails | None = None, bins: int = 10) -> Figure:
    """Draw how many samples have how many neighbors, with a sample for each bin.

    Above each bin stands the sample of that bin whose soft count is nearest the bin's right edge.

    Args:
        record: what to show; samples without a count are left out.
        thumbnails: gives the picture or text of the sample of an index.
        bins: number of bins, evenly spaced between the least and the greatest fraction.

    Source: Charpiat et al., NeurIPS 2019, supplementary material, figure 4.
    """
    check_positive_int("bins", bins)
    view = RecordView(record)
    fractions = view.ranked["neighbor_fraction"].to_numpy(dtype=np.float64)
    with style.styled():
        title = "How many neighbors each sample has" + (f" ({view.title()})" if view.title() else "")
        left_out = f" ({view.num_left_out:,} left out)" if view.num_left_out else ""
        reading = (
            f"Bars count {len(fractions):,} samples{left_out} by neighbor fraction: their soft count N_S over the N = "
            f"{view.num_reference:,} reference samples. Left: isolated, unlike all others to the network; right: crowded. "
            "Above each bin, its sample nearest the right edge."
        )
        figure = style.new_figure(10.6, 5.6, title, reading)
        if not len(fractions):
            _say_nothing(figure, "No sample has a count.")
            return figure
        axes = style.add_axes(figure, 0.75, 0.88, 0.35, 2.42)
        low, high = float(fractions.min()), float(fractions.max())
        margin = 0.0 if high - low > 1e-9 else 0.05
        heights, edges, _ = axes.hist(
            fractions, bins=bins, range=(low - margin, high + margin), color=style.GRADIENT, edgecolor="white", linewidth=1.2
        )
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.14 * max(np.asarray(heights).max(), 1))
        for center, bar in zip((edges[:-1] + edges[1:]) / 2, np.asarray(heights), strict=True):
            if bar:
                axes.text(center, bar, f"{int(bar):,}", ha="center", va="bottom", fontsize=8, color=style.MUTED)
        shown, step = edges[:: -(-len(edges) // 21)], float(edges[1] - edges[0])
        places = max(decimals(step), 2), decimals(step * view.num_reference)
        marks = [f"{edge:.{places[0]}f}\n{edge * view.num_reference:,.{places[1]}f}" for edge in shown]
        axes.set_xticks(shown, marks)
        axes.set_xlabel("neighbor fraction N_S / N and, below it, soft count N_S, at the edges of the bins", labelpad=6)
        axes.set_ylabel("samples")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _draw_representatives(figure, view, thumbnails, bin_representatives(fractions, edges))
    return figure


def _draw_representatives(
    figure: Figure, view: RecordView, thumbnails: Thumbnails | None, chosen: npt.NDArray[np.int64]
) -> None:
    """Draw the chosen sample above each bin, with its id and label."""
    canvas = style.add_canvas(figure)
    pitch = (10.6 - 0.75 - 0.35) / len(chosen)
    side = min(0.84, 0.92 * pitch)
    width = int(pitch * 14)
    for place, position in enumerate(chosen):
        if position < 0:
            continue
        sample = view.sample(int(view.ranked["index"].iloc[position]))
        center = 0.75 + (place + 0.5) * pitch
        box = (center - side / 2, _TITLE + 0.84 - side, side, side)
        style.draw_thumbnail(canvas, thumbnail_of(thumbnails, sample.index), box, empty=shorten(f"#{sample.name}", width))
        style.frame(canvas, box, style.RULE, 0.8)
        name = "" if thumbnails is None else shorten(f"#{sample.name}", width)
        canvas.text(center, 2.01, name, ha="center", va="center", fontsize=7.5, color=style.MUTED)
        if sample.label is not None:
            canvas.text(center, 2.18, shorten(sample.label, width), ha="center", va="center", fontsize=8)


def _say_nothing(figure: Figure, text: str) -> None:
    figure.text(0.5, 0.4, text, ha="center", va="center", fontsize=11, color=style.MUTED)


def plot_neighbor_rows(
    record: Record,
    thumbnails: Thumbnails | None = None,
    queries: Sequence[int] | None = None,
    num_rows: int = 6,
    reference_thumbnails: Thumbnails | None = None,
) -> Figure:
    """Draw samples with their nearest neighbors under the gradient kernel, and below them those under activations.

    A neighbor with another label than the sample's has a red frame and a red label with a "≠".

    Args:
        record: what to show.
        thumbnails: gives the picture or text of the sample of an index.
        queries: indices of the samples; by default `num_rows` of them, evenly spread from isolated to crowded.
        num_rows: how many samples to choose where `queries` is None.
        reference_thumbnails: the same for the reference set, where that is another set; by default `thumbnails`.

    Source: Charpiat et al., NeurIPS 2019, supplementary material, figures 5 to 7 and 13 to 15.
    """
    view = RecordView(record)
    chosen = view.spread(num_rows) if queries is None else [int(index) for index in queries]
    if reference_thumbnails is None and view.reference == "self":
        reference_thumbnails = thumbnails
    rows = _NeighborRows(view, [view.sample(index) for index in chosen], thumbnails, reference_thumbnails)
    with style.styled():
        return rows.draw(", isolated ones first" if queries is None else "")


class _NeighborRows:
    """The layout of `plot_neighbor_rows`, in inches: caption, sample, name of the row, neighbors."""

    caption, gutter, top = 1.55, 0.36, 1.22
    above, below, gap = 0.17, 0.19, 0.10

    def __init__(
        self, view: RecordView, samples: list[SampleView], thumbnails: Thumbnails | None, reference: Thumbnails | None
    ) -> None:
        self.view, self.samples, self.reference = view, samples, reference
        self.queries = [thumbnail_of(thumbnails, sample.index) for sample in samples]
        self.kinds = (False,) if view.record.activation_neighbors is None else (False, True)
        rows = [view.neighbors(sample.index, kind) for sample in samples for kind in self.kinds]
        is_text = any(isinstance(picture, str) for picture in self.queries)
        self.width, self.height = (1.75, 0.86) if is_text else (0.84, 0.84)
        scale = 1.35 if len(self.kinds) == 2 and not is_text else 1.0
        self.wide, self.high = scale * self.width, scale * self.height  # of the query's picture
        self.columns = max([1, *(min(len(row), 6 if is_text else 10) for row in rows)])
        self.pitch = self.above + self.height + self.below + self.gap
        self.block = len(self.kinds) * self.pitch + 0.16
        self.start = 0.25 + self.caption + self.wide + self.gutter + 0.1

    def draw(self, order: str) -> Figure:
        """Return the figure.

        Args:
            order: words on the order of the samples.
        """
        reading = f"Left: a sample{order}. Right: its neighbors, nearest first, with their similarities (1 = the same)"
        reading += "; blue under the gradient kernel, brown under activations." if len(self.kinds) == 2 else "."
        reading += " Red frame and ≠: another label than the sample's." if self.view.is_classified else ""
        size = self.start + self.columns * (self.width + 0.08) + 0.2, self.top + max(len(self.samples), 1) * self.block + 0.1
        title = "Which samples the network treats as similar" + (f" ({self.view.title()})" if self.view.title() else "")
        figure = style.new_figure(max(size[0], 8.6), size[1], title, reading)
        if not self.samples:
            _say_nothing(figure, "No sample has neighbors.")
            return figure
        canvas = style.add_canvas(figure)
        for column in range(self.columns):
            center = self.start + column * (self.width + 0.08) + self.width / 2
            canvas.text(center, self.top - 0.12, str(column + 1), ha="center", va="center", fontsize=8, color=style.MUTED)
        for number, sample in enumerate(self.samples):
            top = self.top + number * self.block
            canvas.plot([0.25, size[0] - 0.2], [top, top], color=style.RULE, linewidth=0.8)
            self._draw_query(canvas, sample, self.queries[number], top + 0.08 + (self.block - 0.16 - self.gap) / 2)
            for line, kind in enumerate(self.kinds):
                self._draw_row(canvas, self.view.neighbors(sample.index, kind), top + 0.08 + line * self.pitch, kind)
        return figure

    def _draw_query(self, canvas: Axes, sample: SampleView, picture: Thumbnail, middle: float) -> None:
        """Draw a sample, and left of it what is known of it."""
        box = (0.25 + self.caption, middle - self.high / 2, self.wide, self.high)
        style.draw_thumbnail(canvas, picture, box, empty=shorten(f"#{sample.name}", 14))
        style.frame(canvas, box, style.INK, 1.2)
        lines = [(f"#{shorten(sample.name, 17)}", style.INK, "bold")]
        if sample.label is not None:
            lines.append((f"label {shorten(sample.label, 14)}", style.INK, "normal"))
        if sample.prediction is not None:
            color = style.MISMATCH if sample.is_wrong else style.MUTED
            lines.append((f"predicted {shorten(sample.prediction, 10)}", color, "bold" if sample.is_wrong else "normal"))
        has_count = np.isfinite(sample.fraction)
        lines.append((f"fraction {sample.fraction:.3f}" if has_count else "left out", style.MUTED, "normal"))
        for number, (text, color, weight) in enumerate(lines):
            y = middle + 0.175 * (number - (len(lines) - 1) / 2)
            x = 0.25 + self.caption - 0.12
            canvas.text(x, y, text, ha="right", va="center", fontsize=8.5, color=color, fontweight=weight)

    def _draw_row(self, canvas: Axes, neighbors: list[NeighborView], top: float, activations: bool) -> None:
        name, color = ("activations", style.ACTIVATION) if activations else ("gradient", style.GRADIENT)
        y = top + self.above + self.height / 2
        x = self.start - 0.16
        canvas.text(x, y, name, ha="center", va="center", rotation=90, fontsize=8.5, color=color, fontweight="bold")
        if not neighbors:
            canvas.text(self.start, y, "no neighbors: the sample was left out", va="center", color=style.MUTED)
        for column, neighbor in enumerate(neighbors[: self.columns]):
            box = (self.start + column * (self.width + 0.08), top + self.above, self.width, self.height)
            differs = neighbor.agrees is False
            center = box[0] + box[2] / 2
            words = f"{neighbor.similarity:.3f}"
            canvas.text(center, box[1] - 0.085, words, ha="center", va="center", fontsize=8, color=color)
            picture = thumbnail_of(self.reference, neighbor.index)
            style.draw_thumbnail(canvas, picture, box, empty=shorten(f"#{neighbor.name}", 12))
            style.frame(canvas, box, style.MISMATCH if differs else style.RULE, 2.2 if differs else 0.8)
            if neighbor.label is not None:
                text = ("≠ " if differs else "") + shorten(neighbor.label, int(self.width * 13) - 2 * differs)
                shade, weight = (style.MISMATCH, "bold") if differs else (style.MUTED, "normal")
                y = box[1] + box[3] + 0.105
                canvas.text(center, y, text, ha="center", va="center", fontsize=8, color=shade, fontweight=weight)


def plot_counts_over_epochs(history: pd.DataFrame | Sequence[Mapping[str, float]]) -> Figure:
    """Draw how the neighbor fraction develops: its distribution, and the mean of each class where there are classes.

    Args:
        history: one row for each record, columns epoch, mean, q10, median, q90, min, max, all but the first fractions in
            [-1, 1]; every further column is the mean of the class of that name. `RecordView.history_row` makes a row.
    """
    history = pd.DataFrame(history)
    missing = [name for name in _BANDS if name not in history]
    if missing:
        raise expected("history", f"a table with the columns {', '.join(missing)}", ", ".join(map(str, history.columns)))
    table = history.sort_values("epoch")
    classes = [str(name) for name in history.columns if name not in _BANDS]
    with style.styled():
        reading = (
            "A high neighbor fraction N_S / N: the network treats many inputs as the same. Falling: it tells more of them "
            "apart."
        )
        figure = style.new_figure(10.6 if classes else 7.8, 4.6, "Neighbor fraction over the epochs", reading)
        right = 5.8 if classes else 0.4
        _draw_bands(style.add_axes(figure, 0.75, 0.62, right, _TITLE + 0.12), table)
        if classes:
            _draw_classes(style.add_axes(figure, 5.6, 0.62, 1.75, _TITLE + 0.12), table, classes)
    return figure


def _draw_bands(axes: Axes, table: pd.DataFrame) -> None:
    epoch = table["epoch"].to_numpy()
    axes.fill_between(epoch, table["min"], table["max"], color=style.GRADIENT, alpha=0.12, linewidth=0, label="all samples")
    axes.fill_between(epoch, table["q10"], table["q90"], color=style.GRADIENT, alpha=0.28, linewidth=0, label="middle 80 %")
    axes.plot(epoch, table["median"], color=style.GRADIENT, linewidth=1.4, linestyle="--", label="median")
    axes.plot(epoch, table["mean"], color=style.INK, linewidth=1.8, marker="o", markersize=4, label="mean")
    if len(epoch) == 1:
        axes.vlines(epoch, table["min"], table["max"], color=style.GRADIENT, alpha=0.4, linewidth=2)
    _label_epochs(axes)
    axes.set_ylabel("neighbor fraction N_S / N")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.10), ncols=4, columnspacing=1.2, handlelength=1.4, borderaxespad=0)


def _draw_classes(axes: Axes, table: pd.DataFrame, classes: list[str]) -> None:
    """Draw one line for each class; beyond thirty classes they share one color and need no key."""
    few = len(classes) <= 30
    for number, name in enumerate(classes):
        color = style.CYCLE[number % len(style.CYCLE)] if few else style.MUTED
        dashes = ("-", "--", ":")[number // len(style.CYCLE)] if few else "-"
        axes.plot(
            table["epoch"],
            table[name],
            color=color,
            linestyle=dashes,
            linewidth=1.4 if few else 0.6,
            marker="o",
            markersize=2.5,
        )
    _label_epochs(axes)
    axes.set_ylabel("mean neighbor fraction of a class")
    if few:
        size = 8.5 if len(classes) <= 15 else 6.5
        names = [shorten(name, 18) for name in classes]
        axes.legend(axes.lines, names, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, fontsize=size)


def _label_epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.margins(x=0.03)
    low, high = axes.dataLim.intervalx
    if low == high:
        axes.set_xlim(low - 1, high + 1)


def plot_similarity_histograms(similarities: Mapping[str, npt.ArrayLike], bins: int = 40) -> Figure:
    """Draw, for each named sample, the histogram of its similarities to the others, on one common axis.

    Args:
        similarities: name of a sample -> its similarities, in [-1, 1], to all others; NaN values are left out.
        bins: number of bins over the common range.

    Source: Charpiat et al., NeurIPS 2019, supplementary material, figures 8 and 12.
    """
    check_positive_int("bins", bins)
    if not similarities:
        raise expected("similarities", "at least one named array", "none")
    arrays = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in similarities.items()}
    arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    everything = np.concatenate(list(arrays.values()))
    span = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
    if span[1] - span[0] < 1e-9:
        span = (span[0] - 0.05, span[1] + 0.05)
    with style.styled():
        reading = (
            "Each row counts the similarities of one sample to all others; the line marks their mean, its neighbor fraction. "
            "The further right, the more of the set the network treats as that sample."
        )
        height = 0.62 * len(arrays)
        figure = style.new_figure(8.2, _TITLE + 0.75 + height, "Similarities of single samples", reading)
        for number, (name, values) in enumerate(arrays.items()):
            top = _TITLE + 0.1 + 0.62 * number
            axes = style.add_axes(figure, 1.9, 0.65 + height - 0.62 * (number + 1), 0.4, top)
            edges, is_last = np.linspace(*span, bins + 1), number == len(arrays) - 1
            axes.hist(values, bins=list(edges), color=style.GRADIENT, histtype="stepfilled", alpha=0.85)
            if len(values):
                axes.axvline(float(values.mean()), color=style.INK, linewidth=1.2)
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(0, None)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            axes.tick_params(axis="x", labelbottom=is_last, length=3 if is_last else 0)
            axes.set_ylabel(shorten(name, 24), rotation=0, ha="right", va="center")
            if is_last:
                axes.set_xlabel("similarity")
    return figure
