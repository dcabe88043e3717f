"""What is known of the samples: columns, predictions, small pictures within a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim.batches import SimilarityBatch
from lightning_netsim.features import DenseFeatureBatch
from lightning_netsim.sample_table import SampleTable
from lightning_netsim.sources import Chunk


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


@pytest.mark.parametrize("inputs", [torch.randn(3, 5), ["one", "two", "three"]])
def test_short_vectors_and_texts_are_kept(inputs: Any) -> None:
    shown = table({"inputs": inputs}).sample_set().shown
    assert shown is not None
    assert len(shown) == 3


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 5000), torch.zeros(3, 5).long(), torch.randn(4, 5), [1, 2, 3], 7])
def test_anything_else_is_not(inputs: Any) -> None:
    assert table({"inputs": inputs}).sample_set().shown is None


def test_pictures_end_with_the_budget() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert table({"inputs": images}, budget=8 * (images.nbytes + 8)).sample_set().shown is not None
    assert table({"inputs": images}, {"inputs": images}, budget=8 * (images.nbytes + 8)).sample_set().shown is None


def test_render_has_the_first_word() -> None:
    shown = table({"inputs": torch.arange(3)}, render=lambda sample: f"<{int(sample)}>").sample_set().shown
    assert shown == ["<0>", "<1>", "<2>"]
