"""What the labels of samples are: classes by number, classes by name, values, or none. It is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

#: The label of a class: its number or its name.
ClassLabel = int | str

LabelKind = Literal["class", "name", "value", "none"]

# Fewer samples say nothing about whether outputs are classes.
_ENOUGH_TO_TELL = 32
# So few different labels can be classes however few samples there are; more are not if each second sample has its own.
_FEW_CLASSES = 20


def label_kind(labels: Sequence[Any] | Tensor | None) -> LabelKind:
    """Return what labels are: "class" numbers, "name"s of classes (or some of each), "value"s, or "none".

    >>> label_kind([0, 3]), label_kind(["cat", "dog"]), label_kind([0.5, 2.0]), label_kind(None)
    ('class', 'name', 'value', 'none')
    """
    if labels is None:
        return "none"
    if isinstance(labels, Tensor):
        return "value" if labels.is_floating_point() else "class"
    if all(isinstance(label, int) for label in labels):
        return "class"
    return "name" if all(isinstance(label, (int, str)) for label in labels) else "value"


def are_classes(labels: Sequence[Any] | Tensor | None) -> bool:
    """Return whether labels can be classes: integers or names."""
    return label_kind(labels) in ("class", "name")


def is_class_number(label: Any, num_classes: int) -> bool:
    """Return whether a label is the number of one of so many classes."""
    return isinstance(label, int) and 0 <= label < num_classes


def are_binary(labels: Sequence[Any] | Tensor | None, num_outputs: int) -> bool:
    """Return whether labels are 0 and 1 beside a single output, also as floats, which a binary loss takes: two classes."""
    if labels is None or num_outputs != 1:
        return False
    return all(value in (0, 1) for value in (labels.tolist() if isinstance(labels, Tensor) else labels))


def class_numbers(labels: Any) -> Tensor | None:
    """Return the labels of a batch as a tensor, a column as shape (B,); None where there are none that are numbers."""
    if isinstance(labels, (list, tuple)) and label_kind(labels) == "class":
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor):
        return None
    return labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels


def are_few(num_labels: int, num_samples: int) -> bool:
    """Return whether so many different labels can be classes of so many samples: not each sample has its own."""
    return num_labels <= max(_FEW_CLASSES, num_samples / 2)


def are_of_classes(predictions: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Return whether the largest outputs can be classes: those of embeddings lie beyond the labels, and hardly agree."""
    if label_kind([*predictions, *labels]) != "class" or len(labels) < _ENOUGH_TO_TELL:
        return True
    if max(labels) < 0 or max(predictions) < 2 * (max(labels) + 1):
        return True
    agreeing = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    return bool(agreeing / len(labels) > 0.05)
