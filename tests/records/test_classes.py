"""Classes that merge and classes that stand alone, told from a made-up record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_netsim.records.classes import class_matrix, class_summary
from lightning_netsim.records.record import Record

NAN = float("nan")


def record_of(similarity: Sequence[Sequence[float]], labels: Sequence[Any] | None = None, counts: Any = None) -> Record:
    """Return a record with a class table and nothing else."""
    number = len(similarity)
    labels = list(range(number)) if labels is None else labels
    counts = [10 + place for place in range(number)] if counts is None else counts
    rows = [(labels[a], labels[b], similarity[a][b], counts[a]) for a in range(number) for b in range(number)]
    table = pd.DataFrame(rows, columns=["label", "other_label", "similarity", "num_samples"])
    return Record(pd.DataFrame(), pd.DataFrame(), classes=table)


def column(record: Record, name: str) -> list[Any]:
    return class_summary(record)[name].tolist()


FOUR = [
    [0.8, 0.78, 0.10, 0.30],
    [0.78, 0.9, 0.20, 0.36],
    [0.10, 0.20, 0.5, 0.05],
    [0.30, 0.36, 0.05, 0.4],
]


def test_the_matrix_has_the_labels_of_the_table_in_its_order() -> None:
    matrix = class_matrix(record_of(FOUR, ["d", "a", "c", "b"]))
    assert list(matrix.index) == list(matrix.columns) == ["d", "a", "c", "b"]
    np.testing.assert_array_equal(matrix.to_numpy(), FOUR)
    asymmetric = class_matrix(record_of([[1.0, 0.25], [0.5, 1.0]]))
    assert asymmetric.loc[0, 1] == 0.25


def test_overlap_is_relative_to_what_both_are_within() -> None:
    summary = class_summary(record_of(FOUR, ["d", "a", 3, 0.5]))
    assert summary["label"].tolist() == ["d", "a", 3, 0.5]
    assert summary["nearest_label"].tolist() == ["a", "d", "a", "a"]
    wanted = [0.78 / math.sqrt(0.72), 0.78 / math.sqrt(0.72), 0.2 / math.sqrt(0.45), 0.36 / math.sqrt(0.36)]
    np.testing.assert_allclose(summary["overlap"], wanted)
    assert summary["similarity"].tolist() == [0.8, 0.9, 0.5, 0.4]
    assert summary["num_samples"].tolist() == [10, 11, 12, 13]
    assert summary["is_merging"].tolist() == [True, True, False, False]
    # The median of 0.919, 0.919, 0.298 and 0.6 is 0.760, half of which is 0.380.
    assert summary["is_isolated"].tolist() == [False, False, True, False]


@pytest.mark.parametrize(("between", "merging"), [(0.9, True), (0.8999, False), (1.2, True)])
def test_classes_merge_from_nine_tenths_on(between: float, merging: bool) -> None:
    assert column(record_of([[1.0, between], [between, 1.0]]), "is_merging") == [merging] * 2


def test_the_median_is_neither_the_mean_nor_the_largest() -> None:
    # Nearest overlaps 0.95 twice, 0.4 three times and 0.25: half the median is 0.2, half the mean 0.28.
    table = np.full((6, 6), 0.1)
    table[2:5, 2:5], table[0, 1], table[1, 0] = 0.4, 0.95, 0.95
    table[5, 0] = table[0, 5] = 0.25
    np.fill_diagonal(table, 1.0)
    assert column(record_of(table.tolist()), "is_isolated") == [False] * 6
    table[5, 0] = table[0, 5] = 0.19
    assert column(record_of(table.tolist()), "is_isolated") == [False] * 5 + [True]


@pytest.mark.filterwarnings("error")
def test_a_class_of_one_sample_overlaps_with_none() -> None:
    summary = class_summary(record_of([[0.8, 0.4, 0.9], [0.4, 0.5, 0.9], [0.9, 0.9, NAN]], counts=[5, 4, 1]))
    assert summary["nearest_label"].tolist()[:2] == [1, 0]
    assert summary["nearest_label"].isna().tolist() == [False, False, True]
    assert summary["overlap"].isna().tolist() == [False, False, True]
    assert summary["similarity"].isna().tolist() == [False, False, True]
    assert summary["is_merging"].tolist() == summary["is_isolated"].tolist() == [False] * 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("within", [-0.1, NAN])
def test_classes_that_are_nothing_within_have_no_overlap(within: float) -> None:
    summary = class_summary(record_of([[within, 0.4], [0.4, within]]))
    assert summary["overlap"].isna().all()
    assert summary["nearest_label"].isna().all()
    assert not summary[["is_merging", "is_isolated"]].to_numpy().any()
    (row,) = class_summary(record_of([[0.7]], ["only"])).to_dict("records")
    assert (row["nearest_label"], row["is_merging"], row["is_isolated"]) == (None, False, False)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(0, 2**31 - 1), st.randoms())
def test_neither_order_nor_scale_matters(number: int, seed: int, random: Any) -> None:
    vectors = np.random.default_rng(seed).normal(size=(number, 3)) + 0.5
    table = vectors @ vectors.T / 50
    order = list(range(number))
    random.shuffle(order)
    first = class_summary(record_of(table.tolist())).set_index("label")
    second = class_summary(record_of((2 * table)[np.ix_(order, order)].tolist(), order)).set_index("label").loc[first.index]
    np.testing.assert_allclose(second["overlap"], first["overlap"])
    assert second["nearest_label"].tolist() == first["nearest_label"].tolist()
    cosine = table / np.sqrt(np.outer(np.diag(table), np.diag(table)))
    for label, row in first.iterrows():
        others = [other for other in range(number) if other != label]
        best = max(others, key=lambda other: cosine[label, other])
        assert row["nearest_label"] == best
        assert row["overlap"] == pytest.approx(cosine[label, best])


@pytest.mark.parametrize("ask", [class_matrix, class_summary])
def test_a_record_of_an_earlier_version_says_that_it_has_none(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"similarities of classes, but got none.*of an earlier version"):
        ask(Record(pd.DataFrame(), pd.DataFrame()))
