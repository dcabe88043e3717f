"""The texts and the figure for single samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_netsim.records.record import Record
from lightning_netsim.report.answers import format_neighbors, format_transfer, plot_transfer
from lightning_netsim.report.figures import figure_to_array

META: dict[str, Any] = {
    "query": 7,
    "label": 0,
    "prediction": 1,
    "change": [0.7071, -0.7071, 0.0],
    "along": 1.0,
    "length": 0.25,
    "num_reference": 1234,
    "reference": "val",
    "class_names": ["cat", "dog"],
    "seconds": 2.0,
}


def table(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"index": [3, 12], "moved": [0.9, 0.5], "along": [0.9, -0.25], **columns})


def record(labels: list[Any] | None, neighbor_labels: list[Any] | None) -> Record:
    samples = pd.DataFrame({"sample_id": [4, 9], "index": [4, 9], "dataloader": 0, "soft_count": [12.5, np.nan]})
    samples["neighbor_fraction"] = samples["soft_count"] / 50
    neighbors = pd.DataFrame({"index": [4, 4], "rank": [1, 2], "neighbor": [1, 30], "similarity": [0.75, 0.5]})
    if labels is not None:
        samples["label"], samples["prediction"] = labels, labels[::-1]
        neighbors["neighbor_label"] = neighbor_labels
    meta = {
        "directions": {"kind": "random", "count": 2},
        "seconds": 1.25,
        "num_reference": 50,
        "reference": "train",
        "stage": "val",
        "notes": ["The outputs sum to one."],
    }
    return Record(samples, neighbors, meta)


def test_neighbors_as_text() -> None:
    text = format_neighbors(record([0, 1], [0, 1]))
    assert text.splitlines()[0] == "Kernel neighbors · val"
    assert "2 samples, compared exactly with 50 of train · outputs: random (2) · took 1.2 s" in text
    assert "Sample 4 · label 0 · predicted 1 ≠ · soft count 12.5 of 50 (fraction 0.250)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "1", "0.7500", "0"] in rows
    assert ["2", "30", "0.5000", "≠", "1"] in rows
    assert "Sample 9 · label 1 · predicted 0 ≠ · left out: its gradient is zero or not finite" in text
    assert "The outputs sum to one." in text
    without = format_neighbors(record(None, None))
    assert ["2", "30", "0.5000"] in [line.split() for line in without.splitlines()]
    assert " label\n" not in without


def test_transfer_as_text() -> None:
    tables = {
        "Moved most": table(label=[0, 1], prediction=[0, 0], margin=[1.0, -2.0], margin_change=[0.5, -0.5]),
        "None": table()[:0],
    }
    text = format_transfer(META, tables)
    assert text.startswith("What else moves if sample 7 is corrected (label cat, prediction dog)\n")
    assert "v moves output cat by +0.707, dog by -0.707. The least change of the parameters" in text
    assert "has length 0.25. It was applied to 1,234 samples of val in 2.0 s." in text.replace("\n", " ")
    assert ["3", "0.9000", "0.9000", "cat", "cat", "1.0000", "0.5000"] in [line.split() for line in text.splitlines()]
    assert "None\n  none" in text
    assert " margin: the output of its label" in text.replace("\n", " ")
    plain = format_transfer({**META, "label": None, "prediction": None, "along": 0.5}, {"Moved most": table()})
    assert plain.startswith("What else moves if sample 7 is corrected\n")
    assert "it moves by 0.5 of v only" in plain.replace("\n", " ")
    assert "margin" not in plain


def test_of_many_outputs_the_most_changed_are_named() -> None:
    text = format_transfer({**META, "change": [1.0, -2.0, 3.0, 4.0, -5.0, 0.0], "class_names": ["cat", "dog"]}, {})
    assert "v moves output 4 by -5, 3 by +4, 2 by +3, dog by -2 and others less. The" in text


@pytest.mark.parametrize(
    "labels", [{}, {"label": [0, 1], "prediction": [1, 1], "margin": [1.0, 2.0], "margin_change": [0.5, 0.25]}]
)
def test_transfer_as_a_figure(labels: dict[str, Any]) -> None:
    tables = {"Moved most": table(**labels), "Margins that grow most" if labels else "Moved most along v": table(**labels)}
    asked: list[int] = []

    def picture(index: int) -> Any:
        asked.append(index)
        return np.zeros((4, 4), dtype=np.uint8)

    meta = META if labels else {**META, "label": None, "prediction": None}
    figure = plot_transfer(meta, tables, picture, picture)
    assert asked == [7, 3, 12, 3, 12]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("+0.900") == (1 if labels else 2)
    assert texts.count("+0.500") == (1 if labels else 0)
    assert ("cat ≠ dog" in texts) == bool(labels)
    assert figure_to_array(figure).std() > 0
    assert ("#7" in texts) != bool(labels)
    without_pictures = plot_transfer(meta, tables, None, None)
    assert {"#7", "#12"} <= {text.get_text() for axes in without_pictures.axes for text in axes.texts}
