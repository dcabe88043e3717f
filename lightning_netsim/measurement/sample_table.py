"""Collect what is known of the samples as a sweep goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_netsim.data.batches import SimilarityBatch, as_column, read_batch
from lightning_netsim.data.labels import ClassLabel, are_binary, are_classes, label_kind
from lightning_netsim.data.processes import Processes
from lightning_netsim.data.samples import Samples
from lightning_netsim.data.sources import Chunk
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, DenseFeatureBatch
from lightning_netsim.measurement.result import SampleSet

_SHOWN_PIXELS = 64
_SHOWN_NUMBERS = 4096
_SHOWN_SHARE = 1 / 8


class SampleTable:
    """The samples of one set, in the order of the sweep.

    Args:
        budget: bytes; small pictures of the samples are kept as long as they take less than an eighth of it.
        render: turns one sample into a picture or text; None keeps small copies of images, and texts.
    """

    def __init__(self, budget: float, render: Callable[[Any], Any] | None = None) -> None:
        self._room = budget * _SHOWN_SHARE
        self._render = render
        # What is known of every sample, chunk by chunk.
        self._tensors: dict[str, list[Tensor]] = {"index": [], "dataloader": [], "outputs": [], "norm": [], "rank": []}
        # What may be missing: None once a chunk lacks it.
        self._columns: dict[str, list[Any] | None] = {"ids": [], "labels": [], "shown": []}
        self._has_values = False

    @property
    def num_samples(self) -> int:
        """Return the number of samples so far."""
        return len(self._index)

    @property
    def num_valid(self) -> int:
        """Return how many of them have a usable gradient."""
        return sum(int((rank > 0).sum()) for rank in self._tensors["rank"])

    @property
    def norm(self) -> Tensor:
        """Return ‖G(x)‖_F, shape (N,)."""
        return torch.cat(self._tensors["norm"])

    @property
    def rank(self) -> Tensor:
        """Return the rank of C(x), shape (N,)."""
        return torch.cat(self._tensors["rank"])

    @property
    def labels(self) -> list[Any] | None:
        """Return the labels; 0.0 and 1.0 beside a single output, floats for the sake of a binary loss, as classes 0 and 1."""
        labels, outputs = self._columns["labels"], self._tensors["outputs"]
        binary = outputs and label_kind(labels) == "value" and are_binary(labels, outputs[0].shape[1])
        return [int(label) for label in labels or []] if binary else labels

    @property
    def _index(self) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._tensors["index"]])

    def add(self, chunk: Chunk, read: SimilarityBatch, features: AbstractFeatureBatch) -> None:
        """Add the samples of a chunk."""
        size = len(chunk.index)
        row = {
            "index": chunk.index,
            "dataloader": torch.full((size,), chunk.dataloader),
            "outputs": read.outputs.detach().float().cpu(),
            "norm": features.norm.detach().cpu(),
            "rank": features.rank.cpu(),
        }
        for name, values in row.items():
            self._tensors[name].append(values)
        self._has_values |= isinstance(read.labels, Tensor) and label_kind(read.labels) == "value"
        found = {
            "ids": as_column(read.ids, size, "ids"),
            "labels": as_column(read.labels, size, "labels"),
            "shown": self._pictures(read.inputs, size),
        }
        for name, entries in found.items():
            column = self._columns[name]
            if column is None or entries is None:
                self._columns[name] = None
            else:
                column.extend(entries)

    def class_labels(self) -> dict[int, ClassLabel] | None:
        """Return the label of each position; None if there are no labels, or these can be no classes."""
        labels = self.labels
        return dict(zip(self._index.tolist(), labels, strict=True)) if labels is not None and are_classes(labels) else None

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the rows of the samples at the positions `index`."""
        positions, order = self._index.sort()
        return order[torch.searchsorted(positions, index)]

    def merge(self, processes: Processes) -> Tensor:
        """Make the tables of all processes one, in the order of the data set, after each has added its part.

        Returns:
            shape (N,), int64: the order that brings the rows of all processes, one after the other, into that of the table.
        """
        if processes.alone:
            return torch.arange(self.num_samples)
        held = processes.gather((self._tensors, self._columns, self._has_values))
        joined = {name: torch.cat([part for tensors, _, _ in held for part in tensors[name]]) for name in self._tensors}
        order = joined["index"].argsort()
        self._tensors = {name: [values[order]] for name, values in joined.items()}
        for name in self._columns:
            parts = [columns[name] for tensors, columns, _ in held if tensors["index"]]
            entries = [entry for part in parts for entry in part or []]
            self._columns[name] = None if None in parts else [entries[row] for row in order.tolist()]
        self._has_values = any(has_values for _, _, has_values in held)
        return order

    def sample_set(self) -> SampleSet:
        """Return the samples."""
        dataloader = torch.cat(self._tensors["dataloader"])
        return SampleSet(self._index, self._columns["ids"], self.labels, dataloader, self._columns["shown"])

    def predictions(self, are_values: bool | None = None) -> list[Any]:
        """Return the predicted classes: the largest of several outputs; of one output its sign if labels are classes.

        Args:
            are_values: whether a single output is a value; None where the labels are to tell.
        """
        outputs = torch.cat(self._tensors["outputs"])
        if outputs.shape[1] > 1:
            return list(outputs.argmax(1).tolist())
        if are_values is None:
            are_values = label_kind(self.labels) != "class"
        return list(outputs[:, 0].tolist() if are_values else (outputs[:, 0] > 0).long().tolist())

    def margin(self) -> Tensor | None:
        """Return the difference of the two largest probabilities, shape (N,).

        Outputs are taken for logits of classes, or for their probabilities if they sum to one. None where that cannot be:
        where labels are values, or a single output is to tell more than two.
        """
        outputs, labels = torch.cat(self._tensors["outputs"]).double(), self.labels
        two = label_kind(labels) == "class" and are_binary(labels, 1)
        listed = labels is not None and any(isinstance(label, float) for label in labels)
        if (self._has_values and not two) or listed or (outputs.shape[1] == 1 and not two):
            return None
        if outputs.shape[1] == 1:
            probabilities = torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], 1)
        else:
            probabilities = outputs.where(outputs != torch.inf, torch.nan)  # A logit of -inf rules a class out.
            rows = probabilities[~probabilities.isnan().any(1)]
            sums_to_one = len(rows) > 0 and bool((rows >= 0).all())
            if not (sums_to_one and torch.allclose(rows.sum(1), rows.new_ones(()), atol=1e-4)):
                probabilities = probabilities.softmax(1)
        largest = probabilities.topk(2, 1).values
        return largest[:, 0] - largest[:, 1]

    def _pictures(self, inputs: Any, size: int) -> list[Any] | None:
        """Return something small to show each sample by, None if there is nothing or no room left."""
        if self._columns["shown"] is None or inputs is None:
            return None
        pictures: list[Any] = []
        if self._render is not None:
            pictures = [self._render(inputs[row]) for row in range(size)]
        elif isinstance(inputs, Tensor):
            small = _small(inputs) if len(inputs) == size else None
            pictures = [] if small is None else list(small.unbind(0))
        elif isinstance(inputs, Sequence) and all(isinstance(text, str) for text in inputs):
            pictures = list(inputs)
        if len(pictures) != size:
            return None
        self._room -= sum(picture.nbytes if isinstance(picture, Tensor) else len(str(picture)) for picture in pictures)
        return pictures if self._room > 0 else None


def _small(inputs: Tensor) -> Tensor | None:
    """Return images at no more than 64 pixels a side, or short vectors, on the CPU; None for anything else."""
    values = inputs.detach()
    if values.ndim == 4 and (values.is_floating_point() or values.dtype == torch.uint8):
        height, width = values.shape[2:]
        scale = max(height, width) / _SHOWN_PIXELS
        if scale > 1:
            size = (max(1, round(height / scale)), max(1, round(width / scale)))
            values = F.interpolate(values.float(), size=size, mode="area")
        return values.cpu().clone()
    if values.ndim in (2, 3) and values.is_floating_point() and values[0].numel() <= _SHOWN_NUMBERS:
        return values.cpu().clone()
    return None


def describe(model: nn.Module, samples: Samples, positions: Sequence[int], table: SampleTable) -> SampleSet:
    """Return labels, names and pictures of the samples at some positions.

    Args:
        model: the network.
        samples: the set.
        positions: ascending.
        table: an empty one, to collect them in.
    """
    if not positions:
        nothing = torch.tensor([], dtype=torch.int64)
        return SampleSet(nothing, None, None, nothing, None)
    for chunk in samples.pick(positions):
        with torch.no_grad():
            read = read_batch(model, chunk.batch, chunk.batch_idx)
        table.add(chunk, read, DenseFeatureBatch(read.outputs))
    return table.sample_set()
