"""Labels: classes by number, classes by name, values, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_netsim.data.batches import as_column
from lightning_netsim.data.labels import (
    are_binary,
    are_classes,
    are_few,
    are_of_classes,
    class_numbers,
    is_class_number,
    label_kind,
)


@pytest.mark.parametrize(
    ("labels", "column", "kind"),
    [
        (torch.tensor([3, 1]), [3, 1], "class"),
        (torch.tensor([[3], [1]]), [3, 1], "class"),
        (["a", "b"], ["a", "b"], "name"),
        (["a", 2], ["a", 2], "name"),
        ([True, False], [True, False], "class"),
        ([torch.tensor(1), torch.tensor(0)], [1, 0], "class"),
        ([0.0, 1.0], [0.0, 1.0], "value"),
        (torch.tensor([0.0, 1.0]), [0.0, 1.0], "value"),
        (torch.zeros(2, 3), None, "none"),
        ([None, 1], None, "none"),
        (None, None, "none"),
    ],
)
def test_the_kind_of_the_labels_of_a_batch(labels: Any, column: list[Any] | None, kind: str) -> None:
    assert as_column(labels, 2, "labels") == column
    assert label_kind(column) == kind
    assert are_classes(column) == (kind in ("class", "name"))


@pytest.mark.parametrize(
    ("labels", "outputs", "binary"),
    [
        ([0.0, 1.0], 1, True),
        (torch.tensor([0.0, 1.0]), 1, True),
        ([0, 1], 1, True),
        ([0.0, 1.0], 2, False),
        ([0.0, 0.5], 1, False),
        ([0.0, 2.0], 1, False),
        (["a", "b"], 1, False),
        (None, 1, False),
    ],
)
def test_zeros_and_ones_beside_a_single_output_are_two_classes(labels: Any, outputs: int, binary: bool) -> None:
    assert are_binary(labels, outputs) == binary


def test_class_numbers_are_a_tensor() -> None:
    for labels in ([3, 1], torch.tensor([3, 1]), torch.tensor([[3], [1]])):
        found = class_numbers(labels)
        assert found is not None
        assert found.tolist() == [3, 1]
    assert class_numbers(["a", "b"]) is class_numbers(None) is None


def test_a_number_is_that_of_a_class() -> None:
    assert [is_class_number(label, 3) for label in (0, 2, 3, -1, 1.0, "1", None)] == [True, True, *[False] * 5]


@pytest.mark.parametrize(("labels", "samples", "few"), [(20, 20, True), (21, 21, False), (30, 60, True), (31, 61, False)])
def test_a_label_for_each_sample_is_no_class(labels: int, samples: int, few: bool) -> None:
    assert are_few(labels, samples) == few


@pytest.mark.parametrize(
    ("predictions", "labels", "shown"),
    [
        ([0, 3] * 20, [0, 1] * 20, True),
        ([2, 63] * 20, [0, 1] * 20, False),  # The 64th output of an embedding is no class.
        ([2, 63] * 19 + [0, 1], [0, 1] * 20, False),  # Some of them agree with the labels by chance.
        ([0, 999] * 20, [0, 1] * 20, True),  # Of a thousand classes, data may hold two.
        ([3] * 40, [1] * 40, True),
        ([63], [0], True),  # One sample says nothing.
        ([0, 40] * 20, ["a", "b"] * 20, True),
        ([0, 40] * 20, [-1] * 40, True),
    ],
)
def test_largest_outputs_can_be_classes(predictions: list[Any], labels: list[Any], shown: bool) -> None:
    assert are_of_classes(predictions, labels) == shown
