"""The square of the similarities of classes."""

from __future__ import annotations

import pandas as pd

from lightning_netsim.report.classes import plot_class_similarity


def test_each_pair_of_classes_has_its_number_at_its_place() -> None:
    matrix = pd.DataFrame([[0.75, -0.25], [0.5, float("nan")]], index=[3, 7], columns=[3, 7])
    axes = plot_class_similarity(matrix, {3: "cat", 7: None}.get).axes[0]
    # A column lies to the right, a row below.
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "0.75",
        (1, 0): "-0.25",
        (0, 1): "0.50",
        (1, 1): "-",
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "-"]
    assert axes.images[0].get_clim() == (-0.25, 1)
    assert not plot_class_similarity(pd.DataFrame(0.5, range(40), range(40)), str).axes[0].texts
