"""What every report reads off a record: extremes, names, neighbors that agree or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_netsim.records.view import RecordView
from tests.report.made_up import NAMES, extremes, make_record


def test_extremes_and_the_spread_between_them() -> None:
    record = make_record(n=60)
    record.samples.loc[extremes(record)[0][0], ["soft_count", "neighbor_fraction"]] = np.nan  # left out, so not isolated
    view, (isolated, crowded) = RecordView(record), extremes(record)
    assert [sample.index for sample in view.isolated(5)] == isolated
    assert [sample.index for sample in view.crowded(5)] == crowded
    spread = view.spread(3)
    assert (len(spread), spread[0], spread[-1]) == (3, isolated[0], crowded[0])
    assert view.num_left_out == 1


@pytest.mark.parametrize(
    ("names", "label", "shown"),
    [
        ({"0": "cat"}, np.int64(0), "cat"),
        ({0: "cat"}, 0, "cat"),
        (["cat"], np.int64(0), "cat"),
        (["cat"], 5, "5"),
        (["cat"], -1, "-1"),
        (None, 0.123456, "0.1235"),
        (["cat"], float("nan"), None),
        (["cat"], None, None),
    ],
)
def test_names_of_labels(names: Any, label: Any, shown: str | None) -> None:
    assert RecordView(make_record(n=12, class_names=names)).class_name(label) == shown


def test_neighbors_agree_where_they_have_the_label_of_the_sample() -> None:
    record = make_record(n=60, k=5)
    label = record.samples["label"]
    for query in (0, 31):
        rows = record.neighbors[record.neighbors["index"] == query].sort_values("rank")
        found = RecordView(record).neighbors(query)
        assert [(near.index, near.similarity) for near in found] == list(zip(rows["neighbor"], rows["similarity"], strict=True))
        assert [near.agrees for near in found] == [label[other] == label[query] for other in rows["neighbor"]]
        assert [near.label for near in found] == [NAMES[label[other]] for other in rows["neighbor"]]


def test_labels_that_are_quantities_or_missing_neither_agree_nor_differ() -> None:
    record = make_record(n=12, class_names=None)
    record.samples["label"] = record.samples["label"] + 0.5
    view = RecordView(record)
    assert len(view.by_class()) == 0
    assert view.neighbors(0)[0].agrees is None
    assert view.sample(3).label == "3.5"
    other = dataclasses.replace(make_record(n=12), meta={"reference": "train"})
    assert {near.agrees for near in RecordView(other).neighbors(0)} == {None}


def test_a_row_of_the_history_is_the_distribution_and_the_mean_of_each_class() -> None:
    record = make_record(n=60)
    row, fraction = RecordView(record).history_row(), record.samples["neighbor_fraction"]
    assert row["epoch"] == 4
    wanted = pd.Series({"q10": np.quantile(fraction, 0.1), "median": fraction.median(), "max": fraction.max()})
    assert {name: row[name] for name in wanted.index} == pytest.approx(wanted.to_dict())
    assert row["six"] == pytest.approx(fraction[record.samples["label"] == 6].mean())
    assert "class mean" in RecordView(make_record(n=60, class_names=["mean", *NAMES[1:]])).history_row()
