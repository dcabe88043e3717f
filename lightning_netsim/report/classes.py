"""Draw how alike the classes of a record are to the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_netsim.records.view import shorten
from lightning_netsim.report import style

_READING = (
    "Mean similarity of the samples of two classes; on the diagonal, of different samples of one. Off it, a dark square is a "
    "pair that the network hardly tells apart."
)
_NAMED = 30


def plot_class_similarity(matrix: pd.DataFrame, class_name: Callable[[Any], str | None]) -> Figure:
    """Draw the mean similarity of each two classes as a square of colors.

    Args:
        matrix: from `lightning_netsim.records.classes.class_matrix`.
        class_name: gives the name of a label.
    """
    number = len(matrix)
    size = min(9.0, max(4.6, 1.6 + 0.42 * number))
    with style.styled():
        figure = style.new_figure(max(size, 6.2), size + 0.2, "How alike the classes are to the network", _READING)
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
