"""The one look of every figure, and what they are drawn with: Figure objects on the Agg canvas, never pyplot's state."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_netsim.report.pictures import Thumbnail

INK, MUTED, RULE, PAPER = "#22262b", "#6b7280", "#d6d9de", "#ffffff"
GRADIENT, ACTIVATION, MISMATCH = "#2f6db3", "#b8741a", "#c8102e"
CYCLE = ("#2f6db3", "#d1622b", "#2e8b57", "#a2457f", "#8a6d1d", "#17879c", "#7a5cc4", "#c0392b", "#5f7d2e", "#6b7280")
DPI = 150

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def styled() -> Any:
    """Return the context within which a figure is built, so that a user's own settings neither leak in nor change."""
    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float, title: str, reading: str) -> Figure:
    """Return an empty figure of `width` by `height` inches with a title and, below it, how to read it."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.text(0.25 / width, 1 - 0.20 / height, title, va="top", ha="left", fontsize=12.5, fontweight="bold")
    lines = textwrap.fill(reading, int((width - 0.5) * 16.0))
    figure.text(0.25 / width, 1 - 0.48 / height, lines, va="top", ha="left", fontsize=8.8, color=MUTED, linespacing=1.35)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Return axes whose margins to the figure's four edges are given in inches."""
    width, height = figure.get_size_inches()
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure.add_axes(box)


def add_canvas(figure: Figure) -> Axes:
    """Return invisible axes over the whole figure whose coordinates are inches from the top left corner."""
    width, height = figure.get_size_inches()
    canvas = figure.add_axes((0.0, 0.0, 1.0, 1.0), label="canvas")
    canvas.set_axis_off()
    canvas.set_autoscale_on(False)
    canvas.set_xlim(0, width)
    canvas.set_ylim(height, 0)
    return canvas


def draw_thumbnail(canvas: Axes, thumbnail: Thumbnail, box: tuple[float, float, float, float], empty: str = "") -> None:
    """Draw a picture, fitted, or a text, wrapped, into `box` = (left, top, width, height) inches of a canvas.

    Without a thumbnail `empty` (say, the sample's id) is written on a light ground instead.
    """
    left, top, width, height = box
    if isinstance(thumbnail, np.ndarray):
        scale = min(width / thumbnail.shape[1], height / thumbnail.shape[0])
        wide, high = thumbnail.shape[1] * scale, thumbnail.shape[0] * scale
        x, y = left + (width - wide) / 2, top + (height - high) / 2
        method = "nearest" if max(thumbnail.shape[:2]) < 48 else "auto"
        place = (x, x + wide, y + high, y)
        canvas.imshow(thumbnail, cmap="gray", vmin=0, vmax=255, interpolation=method, extent=place, aspect="auto")
        return
    canvas.add_patch(Rectangle((left, top), width, height, facecolor="#f3f4f6", edgecolor="none"))
    if thumbnail is None:
        size = min(8.5, 72 * width / max(0.62 * len(empty), 1))
        canvas.text(left + width / 2, top + height / 2, empty, ha="center", va="center", fontsize=size, color=MUTED)
        return
    columns, rows = max(int(width * 72 / 4.1), 6), max(int(height * 72 / 8.6), 1)
    lines = textwrap.wrap(" ".join(thumbnail.split()), columns)
    if len(lines) > rows:
        lines = [*lines[: rows - 1], lines[rows - 1][: columns - 1] + "…"]
    canvas.text(left + 0.05, top + 0.05, "\n".join(lines), ha="left", va="top", fontsize=6.6, linespacing=1.2, clip_on=True)


def frame(canvas: Axes, box: tuple[float, float, float, float], color: str, width: float) -> None:
    """Draw a frame around `box`."""
    canvas.add_patch(Rectangle(box[:2], box[2], box[3], facecolor="none", edgecolor=color, linewidth=width, zorder=3))


def figure_to_array(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return the figure as an image, shape (H, W, 3), uint8: what an image logger takes."""
    canvas: Any = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)  # untyped
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = DPI) -> Path:
    """Write the figure as PNG, to a temporary name that is then renamed, and return its path."""
    target = Path(path)
    staging = target.with_name(f".{target.name}.writing")
    try:
        figure.savefig(staging, format="png", dpi=dpi)
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    return target
