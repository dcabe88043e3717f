"""Figures of studies: panels in rows and columns, and pictures in rows and columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_netsim.report import style

Panels = tuple[Figure, list[list[Axes]]]


@contextmanager
def panels(
    title: str,
    reading: str,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (2.8, 2.2),
    gap: tuple[float, float] = (0.85, 0.75),
    margin: tuple[float, float] = (0.75, 0.35),
    top: float = 1.15,
    bottom: float = 0.6,
) -> Iterator[Panels]:
    """Yield a figure with panels in the package's style, and its axes by row and column; draw within the context.

    Args:
        title: of the figure.
        reading: how to read it.
        rows: of panels.
        columns: of panels.
        size: width and height of a panel, inches.
        gap: between panels.
        margin: left of the panels, and right of them.
        top: what title and reading take.
        bottom: what stands below the panels.
    """
    (width, height), (across, down), (left, right) = size, gap, margin
    wide = left + columns * (width + across) - across + right
    high = top + rows * (height + down) - down + bottom
    with style.styled():
        figure = style.new_figure(wide, high, title, reading)
        axes = []
        for row in range(rows):
            above = top + row * (height + down)
            starts = [left + column * (width + across) for column in range(columns)]
            axes.append([style.add_axes(figure, x, high - above - height, wide - x - width, above) for x in starts])
        yield figure, axes


def pictures(
    title: str, reading: str, rows: Mapping[str, Mapping[str, npt.NDArray[np.uint8]]], side: float = 1.25, left: float = 0.7
) -> Figure:
    """Return a figure of square pictures: a row for each name, in it a column for each name of a picture."""
    columns, gap, top = len(next(iter(rows.values()))), 0.04, 1.05
    with style.styled():
        pitch = side + gap
        figure = style.new_figure(left + columns * pitch + 0.25, top + len(rows) * pitch + 0.2, title, reading)
        draw_pictures(style.add_canvas(figure), rows, (left, top), side, gap)
    return figure


def draw_pictures(
    canvas: Axes,
    rows: Mapping[str, Mapping[str, npt.NDArray[np.uint8]]],
    corner: tuple[float, float],
    side: float,
    gap: float = 0.04,
) -> None:
    """Draw named rows of named square pictures on a canvas, their upper left corner at these inches."""
    (left, top), pitch = corner, side + gap
    for row, (name, images) in enumerate(rows.items()):
        canvas.text(left - 0.08, top + row * pitch + side / 2, name, ha="right", va="center", fontsize=8)
        for column, (heading, image) in enumerate(images.items()):
            style.draw_thumbnail(canvas, image, (left + column * pitch, top + row * pitch, side, side))
            if row == 0:
                canvas.text(left + (column + 0.5) * pitch, top - 0.06, heading, ha="center", va="bottom", fontsize=8.5)
