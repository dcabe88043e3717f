"""Results become tables, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_netsim.functional.results import ClassSimilarityResult, KernelNeighborsResult, NeighborCountResult
from lightning_netsim.measurement.result import SampleSet, SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.records import tables
from lightning_netsim.records.record import SCHEMA_VERSION, read_record, write_record
from lightning_netsim.records.tables import make_record, scalars

NAN = float("nan")


def samples(index: list[int], labels: list[Any] | None = None, ids: list[Any] | None = None) -> SampleSet:
    return SampleSet(torch.tensor(index), ids, labels, torch.zeros(len(index), dtype=torch.int64), None)


def made(queries: SampleSet, reference: SampleSet | None = None, **changes: Any) -> SimilarityResult:
    """Return a result of four queries, the third left out, with two neighbors each."""
    neighbors = KernelNeighborsResult(
        torch.tensor([[0.9, 0.5], [0.8, NAN], [NAN, NAN], [0.7, 0.6]]), torch.tensor([[5, 9], [3, -1], [-1, -1], [5, 3]]), 1.0
    )
    counts = NeighborCountResult(
        torch.tensor([2.0, 1.5, NAN, 1.0]), 8, {0.9: torch.tensor([2, 1, 0, 1])}, {1.5: torch.tensor([2.0, 1.0, NAN, 1.0])}
    )
    result = SimilarityResult(
        counts=counts,
        neighbors=neighbors,
        activation_neighbors=None,
        queries=queries,
        reference=queries if reference is None else reference,
        predictions=[0, 1, 1, 0],
        norm=torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64),
        rank=torch.tensor([3, 3, 0, 2]),
        num_left_out=1,
        num_directions=3,
        plan={"kind": "store"},
        similarity_error=0.0,
        sweep_disagreement=1e-7,
        notes=("a remark",),
        seconds=0.5,
    )
    return replace(result, **changes)


SETTINGS = SweepSettings(k=2, directions="all", thresholds=(0.9,), powers=(1.5,))
INDEX = [3, 5, 7, 9]


def test_samples_table_has_one_row_for_each_query() -> None:
    table = make_record(made(samples(INDEX, [0, 1, 1, 0])), SETTINGS, {}).samples
    assert table["sample_id"].tolist() == table["index"].tolist() == INDEX
    np.testing.assert_array_equal(table["soft_count"], [2.0, 1.5, NAN, 1.0])
    np.testing.assert_array_equal(table["neighbor_fraction"], [0.25, 0.1875, NAN, 0.125])
    np.testing.assert_array_equal(table["hard_count_0.9"], [2, 1, 0, 1])
    np.testing.assert_array_equal(table["power_count_1.5"], [2.0, 1.0, NAN, 1.0])
    assert table["gradient_norm"].tolist() == [1, 2, 0, 3]
    assert table["rank"].tolist() == [3, 3, 0, 2]
    # 3 (class 0) lists 5 (1) and 9 (0); 5 (1) lists 3 (0); 7 lists none; 9 (0) lists 5 (1) and 3 (0).
    np.testing.assert_array_equal(table["same_class_fraction"], [0.5, 0.0, NAN, 0.5])


def test_neighbors_table_has_a_row_for_each_pair_that_was_found() -> None:
    record = make_record(made(samples(INDEX, [0, 1, 1, 0])), SETTINGS, {})
    rows = [(3, 1, 5), (3, 2, 9), (5, 1, 3), (9, 1, 5), (9, 2, 3)]
    assert list(record.neighbors[["index", "rank", "neighbor"]].itertuples(index=False, name=None)) == rows
    np.testing.assert_allclose(record.neighbors["similarity"], [0.9, 0.5, 0.8, 0.7, 0.6], rtol=1e-6)
    assert "neighbor_label" not in record.neighbors
    assert record.activation_neighbors is None
    other = KernelNeighborsResult(torch.full((4, 1), 0.25), torch.tensor([[5], [3], [3], [5]]))
    found = make_record(made(samples(INDEX), activation_neighbors=other), SETTINGS, {}).activation_neighbors
    assert found is not None
    assert found[["rank", "neighbor"]].to_numpy().tolist() == [[1, 5], [1, 3], [1, 3], [1, 5]]


def test_quantities_are_labels_but_not_classes() -> None:
    table = make_record(made(samples(INDEX, [0.5, 1.5, 2.0, 3.0], list("abcd"))), SETTINGS, {}).samples
    assert table["label"].tolist() == [0.5, 1.5, 2.0, 3.0]
    assert table["sample_id"].tolist() == list("abcd")
    assert "same_class_fraction" not in table
    assert not {"label", "prediction", "same_class_fraction"} & set(make_record(made(samples(INDEX)), SETTINGS, {}).samples)


def test_neighbors_in_another_set_bring_their_labels() -> None:
    reference = samples([3, 5, 9], [0, 2, 0])
    record = make_record(made(samples([0, 1, 2, 3], [0, 1, 1, 0]), reference), SETTINGS, {})
    assert record.neighbors["neighbor_label"].tolist() == [2, 0, 0, 2, 0]
    np.testing.assert_array_equal(record.samples["same_class_fraction"], [0.5, 0.0, NAN, 0.5])
    unlabeled = make_record(made(samples([0, 1, 2, 3], [0, 1, 1, 0]), samples([3, 5, 9])), SETTINGS, {})
    assert "neighbor_label" not in unlabeled.neighbors
    assert "same_class_fraction" not in unlabeled.samples


def test_the_margin_stands_where_outputs_are_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    margin = torch.tensor([0.5, 0.25, NAN, 1.0], dtype=torch.float64)
    for labels in ([0, 1, 1, 0], None):
        table = make_record(made(samples(INDEX, labels), margin=margin), SETTINGS, {}).samples
        np.testing.assert_array_equal(table["margin"], margin)
        assert table["margin"].dtype == np.float64
    assert "margin" not in make_record(made(samples(INDEX)), SETTINGS, {}).samples
    monkeypatch.setattr(tables, "are_of_classes", lambda predictions, labels: False)
    table = make_record(made(samples(INDEX, [0, 1, 1, 0]), margin=margin), SETTINGS, {}).samples
    assert not {"margin", "prediction"} & set(table)


def test_means_over_the_own_class_and_over_the_others_are_columns() -> None:
    same, other = torch.tensor([0.5, NAN, NAN, 0.25]), torch.tensor([-0.5, 0.0, NAN, 1.0])
    table = make_record(made(samples(INDEX, [0, 1, 1, 0]), same_class=same, other_class=other), SETTINGS, {}).samples
    np.testing.assert_array_equal(table["same_class_similarity"], [0.5, NAN, NAN, 0.25])
    np.testing.assert_array_equal(table["other_class_similarity"], [-0.5, 0.0, NAN, 1.0])
    assert table["same_class_similarity"].dtype == np.float64
    without = make_record(made(samples(INDEX, [0, 1, 1, 0])), SETTINGS, {}).samples
    assert not {"same_class_similarity", "other_class_similarity"} & set(without)


@pytest.mark.parametrize("classes", [[3, 5], ["ant", "bee"]])
def test_each_ordered_pair_of_classes_is_a_row(tmp_path: Any, classes: list[Any]) -> None:
    found = ClassSimilarityResult(classes, torch.tensor([3, 1]), torch.tensor([[0.5, 0.25], [0.75, NAN]]))
    record = make_record(made(samples(INDEX), classes=found), SETTINGS, {})
    assert record.classes is not None
    first, second = classes
    rows = [(first, first, 3), (first, second, 3), (second, first, 1), (second, second, 1)]
    assert list(record.classes.drop(columns="similarity").itertuples(index=False, name=None)) == rows
    np.testing.assert_array_equal(record.classes["similarity"], [0.5, 0.25, 0.75, NAN])
    again = read_record(write_record(tmp_path / "record", record))
    assert again.classes is not None
    assert again.classes.equals(record.classes)
    assert make_record(made(samples(INDEX)), SETTINGS, {}).classes is None


def test_scalars_leave_out_what_was_not_measured() -> None:
    full = scalars(make_record(made(samples(INDEX, [0, 1, 1, 0])), SETTINGS, {}))
    assert full == pytest.approx(
        {"neighbor_fraction": 0.1875, "same_class_fraction": 1 / 3, "recall": 1.0, "left_out": 1.0}, abs=1e-9
    )
    unknown = replace(made(samples(INDEX)).neighbors, recall=None)
    assert set(scalars(make_record(made(samples(INDEX), neighbors=unknown), SETTINGS, {}))) == {"neighbor_fraction", "left_out"}


def test_meta_holds_settings_findings_and_context() -> None:
    result = made(samples(INDEX), samples([3, 5, 9]))
    meta = make_record(result, replace(SETTINGS, parameters=("a", "b"), seed=7), {"epoch": 4, "stage": "test"}).meta
    wanted = {
        "schema_version": SCHEMA_VERSION,
        "num_samples": 4,
        "num_reference": 8,
        "num_left_out": 1,
        "parameters": ["a", "b"],
        "directions": {"kind": "all", "count": 3, "seed": 7},
        "precision": "float64",
        "plan": {"kind": "store"},
        "k": 2,
        "recall": 1.0,
        "similarity_error": 0.0,
        "count_errors": {},
        "sweep_disagreement": 1e-7,
        "notes": ["a remark"],
        "seconds": 0.5,
        "epoch": 4,
        "stage": "test",
        "global_step": None,
        "reference": "other",
        "weights": "raw",
        "class_names": None,
    }
    assert {key: meta[key] for key in wanted} == wanted
    assert set(meta) == {*wanted, "versions"}
    assert set(meta["versions"]) == {"lightning_netsim", "torch", "lightning", "faiss"}
    assert all(meta["versions"].values())
