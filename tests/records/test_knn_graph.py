"""The neighbor table as a sparse matrix of distances."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import analyze, load_run
from lightning_netsim.records.knn_graph import knn_graph
from lightning_netsim.records.record import Record
from tests.measuring import classifier

pytest.importorskip("scipy")


def record_of(rows: Sequence[tuple[int, int, int, float]], index: Sequence[int], reference: str | None = "self") -> Record:
    """Return a record with rows (index, rank, neighbor, similarity) and samples in the order of `index`."""
    neighbors = pd.DataFrame(rows, columns=["index", "rank", "neighbor", "similarity"])
    return Record(pd.DataFrame({"index": index}), neighbors, {} if reference is None else {"reference": reference})


ROWS = [(0, 1, 2, 1.0), (0, 2, 1, 0.5), (1, 1, 0, 0.5), (1, 2, 2, -1.0), (2, 1, 0, 1.0), (2, 2, 1, -1.0)]
ONE = math.sqrt(2 * 0.5)


def rows_of(graph: Any) -> list[list[tuple[int, float]]]:
    """Return (column, value) of each row, as they are stored."""
    parts = [slice(*pair) for pair in zip(graph.indptr[:-1], graph.indptr[1:], strict=True)]
    return [list(zip(graph.indices[part].tolist(), graph.data[part].tolist(), strict=True)) for part in parts]


def test_distances_of_unit_vectors() -> None:
    graph = knn_graph(record_of(ROWS, [0, 1, 2]))
    assert graph.format == "csr"
    assert graph.shape == (3, 3)
    assert graph.dtype == np.float64
    # Distances of 0 are stored.
    assert rows_of(graph) == [[(2, 0.0), (1, ONE)], [(0, ONE), (2, 2.0)], [(0, 0.0), (1, 2.0)]]
    beyond = knn_graph(record_of([(0, 1, 1, 1 + 1e-7), (1, 1, 0, 1 + 1e-7)], [0, 1], None))
    assert beyond.data.tolist() == [0, 0]


@pytest.mark.parametrize("index", [[2, 0, 1], [0, 2, 1], [1, 2, 0]])
def test_rows_and_columns_follow_the_samples_table(index: list[int]) -> None:
    dense = knn_graph(record_of(ROWS, [0, 1, 2])).toarray()
    shuffled = knn_graph(record_of([ROWS[place] for place in (3, 5, 0, 2, 4, 1)], index))
    np.testing.assert_array_equal(shuffled.toarray(), dense[np.ix_(index, index)])
    assert all([value for _, value in row] == sorted(value for _, value in row) for row in rows_of(shuffled))


@pytest.mark.parametrize(
    ("rows", "bad"), [(ROWS[:4], 2), (ROWS[:2] + ROWS[3:], 1), (ROWS[2:], 0), ([], 0)], ids=["none", "fewer", "first", "all"]
)
def test_a_sample_without_its_neighbors_is_named(rows: list[tuple[int, int, int, float]], bad: int) -> None:
    with pytest.raises(ValueError, match=rf"every sample has neighbors, but got none, or too few, for sample {bad}\. Measure"):
        knn_graph(record_of(rows, [0, 1, 2]))


def test_neighbors_in_another_set_make_no_square_matrix() -> None:
    with pytest.raises(ValueError, match="compared with each other, but got one whose reference is 'train'"):
        knn_graph(record_of(ROWS, [0, 1, 2], "train"))


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ValueError, match=r'no such package\. Install it: pip install "lightning-netsim\[datalab\]"'):
        knn_graph(record_of(ROWS, [0, 1, 2]))


def points(number: int = 40) -> TensorDataset:
    inputs = torch.randn(number, 6)
    inputs[1] = inputs[0]
    return TensorDataset(inputs, torch.arange(number) % 3)


@pytest.mark.parametrize("options", [{}, {"max_samples": 17, "plan": "sketch"}])
def test_of_a_measurement_and_of_its_record_on_disk(tmp_path: Path, options: dict[str, Any]) -> None:
    analysis = analyze(
        classifier(), DataLoader(points(), 8), k=4, directions="all", compare_activations=False, progress=False, **options
    )
    graph, number = analysis.knn_graph(), len(analysis.samples)
    assert graph.shape == (number, number)
    assert np.diff(graph.indptr).tolist() == [4] * number
    index = analysis.samples["index"].tolist()
    for place, row in enumerate(rows_of(graph)):
        own = analysis.neighbors[analysis.neighbors["index"] == index[place]].sort_values("rank")
        assert [index[column] for column, _ in row] == own["neighbor"].tolist()
        wanted = [math.sqrt(max(0.0, 2 * (1 - value))) for value in own["similarity"]]
        np.testing.assert_allclose([value for _, value in row], wanted, atol=1e-12)
    assert (np.diff(graph.data.reshape(-1, 4)) >= 0).all()
    again = load_run(analysis.save(tmp_path / "record")).knn_graph()
    assert (again != graph).nnz == 0
    assert again.nnz == graph.nnz


def test_cleanlab_takes_it() -> None:
    cleanlab = pytest.importorskip("cleanlab")
    data = points(60)
    analysis = analyze(classifier(), DataLoader(data, 20), k=12, compare_activations=False, progress=False)
    lab = cleanlab.Datalab({"label": data.tensors[1].numpy()}, label_name="label", verbosity=0)
    lab.find_issues(knn_graph=analysis.knn_graph(), issue_types={"near_duplicate": {}, "outlier": {}})
    found = lab.get_issues("near_duplicate")
    assert found["is_near_duplicate_issue"].tolist()[:2] == [True, True]
    assert found["near_duplicate_score"].tolist()[:2] == pytest.approx([0, 0], abs=1e-2)
    assert len(lab.get_issues("outlier")) == 60
