"""What is known of the samples: columns, predictions, small pictures within a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim.data.batches import SimilarityBatch
from lightning_netsim.data.sources import Chunk
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.measurement.sample_table import SampleTable
from tests import class_oracles


def table(*parts: dict[str, Any], budget: float = 1e9, render: Any = None) -> SampleTable:
    made = SampleTable(budget, render)
    start = 0
    for part in parts:
        outputs = part.get("outputs", torch.eye(3, 2))
        index = part.get("index", torch.arange(start, start + len(outputs)))
        start += len(outputs)
        read = SimilarityBatch(outputs, part.get("labels"), part.get("ids"), part.get("inputs"))
        made.add(Chunk(None, index, dataloader=part.get("dataloader", 0)), read, DenseFeatureBatch(outputs))
    return made


def test_columns_go_on_from_chunk_to_chunk() -> None:
    made = table(
        {"labels": torch.tensor([1, 2, 3]), "ids": ["a", "b", "c"]},
        {
            "labels": [4, 5, 6],
            "ids": ["d", "e", "f"],
            "dataloader": 1,
            "outputs": torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]),
        },
    )
    found = made.sample_set()
    assert found.labels == [1, 2, 3, 4, 5, 6]
    assert found.ids == list("abcdef")
    assert found.dataloader.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.index.tolist() == list(range(6))
    assert (made.num_samples, made.num_valid) == (6, 4)
    torch.testing.assert_close(made.norm, torch.tensor([1.0, 1.0, 0.0, 5.0, 0.0, 1.0]))
    assert made.rank.tolist() == [1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("column", ["labels", "ids"])
def test_a_column_that_one_chunk_lacks_is_none(column: str) -> None:
    full = {"labels": [1, 2, 3], "ids": ["a", "b", "c"]}
    for parts in ((full, {**full, column: None}), ({**full, column: None}, full)):
        found = table(*parts).sample_set()
        assert getattr(found, column) is None
        assert getattr(found, "ids" if column == "labels" else "labels") is not None


def test_rows_of_positions_in_any_order() -> None:
    made = table({"index": torch.tensor([30, 10, 20])}, {"index": torch.tensor([5, 40, 7])})
    assert made.rows_of(torch.tensor([5, 30, 20])).tolist() == [3, 0, 2]


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (([1, 2, 3], ["a", "b", "c"]), [1, 2, 3, "a", "b", "c"]),
        ((torch.tensor([1, 2, 3]), torch.tensor([[4], [5], [6]])), [1, 2, 3, 4, 5, 6]),
        (([1, 2, 3], [1.0, 2, 3]), None),
        (([1, 2, 3], None), None),
        ((None, [1, 2, 3]), None),
        ((torch.rand(3), [1, 2, 3]), None),
        (([1, 2, 3], torch.zeros(3, 2)), None),
    ],
)
def test_labels_of_classes_by_position(labels: tuple[Any, Any], wanted: list[Any] | None) -> None:
    index = [[30, 10, 20], [5, 40, 7]]
    made = table(*({"labels": column, "index": torch.tensor(part)} for column, part in zip(labels, index, strict=True)))
    expected = None if wanted is None else dict(zip([*index[0], *index[1]], wanted, strict=True))
    assert (made.class_labels() or None) == expected


@pytest.mark.parametrize(
    ("outputs", "labels", "wanted"),
    [
        (torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 1.0]]), None, [1, 0]),
        (torch.tensor([[0.5], [-0.5]]), [1, 0], [1, 0]),
        (torch.tensor([[0.5], [-0.5]]), [0.1, 0.2], [0.5, -0.5]),
        (torch.tensor([[0.5], [-0.5]]), None, [0.5, -0.5]),
    ],
)
def test_predictions(outputs: Tensor, labels: list[Any] | None, wanted: list[Any]) -> None:
    assert table({"outputs": outputs, "labels": labels}).predictions() == wanted


def test_only_floats_beside_a_single_output_are_read_as_classes() -> None:
    single, several = torch.tensor([[0.5], [-0.5]]), torch.zeros(2, 2)
    for outputs, labels, kind in ((single, [1.0, 0.0], int), (single, [True, False], bool), (several, [1.0, 0.0], float)):
        found = table({"outputs": outputs, "labels": labels}).labels
        assert found == labels
        assert {type(label) for label in found} == {kind}


@pytest.mark.parametrize("labels", [None, [1, 0], [0.1, 0.2], ["a", "b"]])
def test_a_caller_may_say_what_a_single_output_is(labels: list[Any] | None) -> None:
    made = table({"outputs": torch.tensor([[0.5], [-0.5]]), "labels": labels})
    assert made.predictions(are_values=True) == [0.5, -0.5]
    assert made.predictions(are_values=False) == [1, 0]
    several = table({"outputs": torch.tensor([[1.0, 2.0], [3.0, 2.0]]), "labels": labels})
    assert several.predictions(are_values=True) == several.predictions(are_values=False) == [1, 0]


def gap(row: list[float]) -> float:
    """Return the difference of the two largest softmax probabilities of some logits."""
    shares = sorted(math.exp(value) / sum(math.exp(other) for other in row) for value in row)
    return shares[-1] - shares[-2]


LOGITS = [[2.0, -1.0, 0.5], [0.0, 0.0, -3.0], [-7.0, 4.0, 3.5]]
RULED_OUT = [[2.0, -math.inf, 0.5], [0.0, 0.0, -math.inf], [-math.inf, 4.0, -math.inf]]
NO_DISTRIBUTIONS = [[0.7, 0.3], [1.5, -0.5], [0.6, 0.5]]


@pytest.mark.parametrize(
    ("outputs", "labels", "wanted"),
    [
        (LOGITS, None, [gap(row) for row in LOGITS]),
        (LOGITS, ["a", "b", "c"], [gap(row) for row in LOGITS]),
        (RULED_OUT, None, [gap(row) for row in RULED_OUT]),
        # Rows that sum to one are probabilities, unless another row does not, or holds a negative number.
        ([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [math.nan] * 3], None, [0.5, 1.0, math.nan]),
        (NO_DISTRIBUTIONS[:2], None, [gap(row) for row in NO_DISTRIBUTIONS[:2]]),
        (NO_DISTRIBUTIONS[::2], None, [gap(row) for row in NO_DISTRIBUTIONS[::2]]),
        ([[1e4, -1e4], [-1e30, 1e30]], None, [1.0, 1.0]),
        ([[math.inf, 0.0], [math.nan, 0.5], [3.0, 0.7]], None, [math.nan, math.nan, gap([3.0, 0.7])]),
        ([[math.inf, 0.0], [0.3, 0.7]], None, [math.nan, 0.4]),
        # A single output beside labels of two classes is the logit of one of them.
        ([[2.0], [0.0], [-3.0]], torch.tensor([1, 0, 1]), [gap([0.0, value]) for value in (2.0, 0.0, -3.0)]),
        ([[2.0], [0.0], [-3.0]], [0.0, 1.0, 0.0], [gap([0.0, value]) for value in (2.0, 0.0, -3.0)]),
        ([[2.0], [0.0], [-3.0]], None, None),
        ([[2.0], [0.0], [-3.0]], [0, 1, 2], None),
        ([[2.0], [0.0], [-3.0]], ["a", "b", "a"], None),
        # Values have no margin.
        (LOGITS, torch.rand(3, 2), None),
        (LOGITS, [0.5, 1, 2], None),
    ],
)
def test_margin(outputs: Any, labels: Any, wanted: list[float] | None) -> None:
    margin = table({"outputs": torch.tensor(outputs), "labels": labels}).margin()
    assert (margin is None) == (wanted is None)
    if margin is not None:
        assert margin.tolist() == pytest.approx(wanted, abs=1e-7, nan_ok=True)


def test_the_margin_of_several_processes_is_the_same_in_each() -> None:
    values, nothing = table({"outputs": torch.randn(3, 2), "labels": torch.rand(3, 2)}), SampleTable(1e9)
    tables = [values, nothing]
    class_oracles.in_threads(lambda processes: tables[processes.rank].merge(processes), 2)
    assert [made.margin() for made in tables] == [None, None]


def test_images_are_kept_small() -> None:
    images = torch.rand(3, 1, 256, 128)
    shown = table({"inputs": images}).sample_set().shown
    assert shown is not None
    assert [tuple(picture.shape) for picture in shown] == [(1, 64, 32)] * 3
    torch.testing.assert_close(shown[0].mean(), images[0].mean())
    tiny = torch.rand(3, 3, 8, 8)
    kept = table({"inputs": tiny}).sample_set().shown
    assert kept is not None
    assert torch.equal(torch.stack(kept), tiny)
    assert kept[0].data_ptr() != tiny.data_ptr()


@pytest.mark.parametrize(
    ("inputs", "are_kept"),
    [
        (torch.randn(3, 5), True),
        (["one", "two", "three"], True),
        (torch.randn(3, 5000), False),
        (torch.zeros(3, 5).long(), False),
        (torch.randn(4, 5), False),
        ([1, 2, 3], False),
        (None, False),
    ],
)
def test_short_vectors_and_texts_are_kept(inputs: Any, are_kept: bool) -> None:
    shown = table({"inputs": inputs}).sample_set().shown
    assert (None if shown is None else len(shown)) == (3 if are_kept else None)


def test_pictures_end_with_the_budget() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert table({"inputs": images}, budget=8 * (images.nbytes + 8)).sample_set().shown is not None
    assert table({"inputs": images}, {"inputs": images}, budget=8 * (images.nbytes + 8)).sample_set().shown is None


def test_render_has_the_first_word() -> None:
    shown = table({"inputs": torch.arange(3)}, render=lambda sample: f"<{int(sample)}>").sample_set().shown
    assert shown == ["<0>", "<1>", "<2>"]
