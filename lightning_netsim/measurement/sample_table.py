"""Collect what is known of the samples as a sweep goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_netsim.data.batches import SimilarityBatch, as_column, read_batch
from lightning_netsim.data.labels import ClassLabel
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
        self._index: list[Tensor] = []
        self._dataloader: list[Tensor] = []
        self._ids: list[Any] | None = []
        self._labels: list[Any] | None = []
        self._shown: list[Any] | None = []
        self._outputs: list[Tensor] = []
        self._norm: list[Tensor] = []
        self._rank: list[Tensor] = []
        self._has_values = False

    @property
    def num_samples(self) -> int:
        """Return the number of samples so far."""
        return sum(map(len, self._index))

    @property
    def num_valid(self) -> int:
        """Return how many of them have a usable gradient."""
        return sum(int((rank > 0).sum()) for rank in self._rank)

    @property
    def norm(self) -> Tensor:
        """Return ‖G(x)‖_F, shape (N,)."""
        return torch.cat(self._norm)

    @property
    def rank(self) -> Tensor:
        """Return the rank of C(x), shape (N,)."""
        return torch.cat(self._rank)

    def add(self, chunk: Chunk, read: SimilarityBatch, features: AbstractFeatureBatch) -> None:
        """Add the samples of a chunk."""
        size = len(chunk.index)
        self._index.append(chunk.index)
        self._dataloader.append(torch.full((size,), chunk.dataloader))
        self._outputs.append(read.outputs.detach().float().cpu())
        self._norm.append(features.norm.detach().cpu())
        self._rank.append(features.rank.cpu())
        self._has_values |= isinstance(read.labels, Tensor) and read.labels.is_floating_point()
        self._ids = _extend(self._ids, as_column(read.ids, size, "ids"))
        self._labels = _extend(self._labels, as_column(read.labels, size, "labels"))
        self._shown = _extend(self._shown, self._pictures(read.inputs, size))

    @property
    def labels(self) -> list[Any] | None:
        """Return the labels; 0.0 and 1.0 beside a single output, floats for the sake of a binary loss, as classes 0 and 1."""
        labels = self._labels
        single = bool(self._outputs) and self._outputs[0].shape[1] == 1
        binary = labels and single and all(isinstance(label, float) and label in (0.0, 1.0) for label in labels)
        return [int(label) for label in labels or []] if binary else labels

    def class_labels(self) -> dict[int, ClassLabel] | None:
        """Return the label of each position; None if there are no labels, or these can be no classes."""
        labels = self.labels
        if labels is None or not are_classes(labels):
            return None
        return dict(zip(torch.cat([torch.zeros(0, dtype=torch.int64), *self._index]).tolist(), labels, strict=True))

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the rows of the samples at the positions `index`."""
        positions, order = torch.cat([torch.zeros(0, dtype=torch.int64), *self._index]).sort()
        return order[torch.searchsorted(positions, index)]

    def share(self, processes: Processes) -> Tensor:
        """Make the tables of all processes one, in the order of the data set, after each has added its part.

        Returns:
            shape (N,), int64: the order that brings the rows of all processes, one after the other, into that of the table.
        """
        if processes.alone:
            return torch.arange(self.num_samples)
        tables = processes.gather(vars(self) | {"_render": None})
        for name in ("_index", "_dataloader", "_outputs", "_norm", "_rank"):
            setattr(self, name, [torch.cat([tensor for table in tables for tensor in table[name]])])
        order = self._index[0].argsort()
        for name in ("_index", "_dataloader", "_outputs", "_norm", "_rank"):
            setattr(self, name, [getattr(self, name)[0][order]])
        self._has_values = any(table["_has_values"] for table in tables)
        for name in ("_ids", "_labels", "_shown"):
            columns = [table[name] for table in tables if table["_index"]]
            joined = [value for column in columns for value in column or []]
            whole = all(column is not None for column in columns)
            setattr(self, name, [joined[row] for row in order.tolist()] if whole else None)
        return order

    def sample_set(self) -> SampleSet:
        """Return the samples."""
        return SampleSet(torch.cat(self._index), self._ids, self.labels, torch.cat(self._dataloader), self._shown)

    def predictions(self, are_values: bool | None = None) -> list[Any]:
        """Return the predicted classes: the largest of several outputs; of one output its sign if labels are classes.

        Args:
            are_values: whether a single output is a value; None where the labels are to tell.
        """
        outputs = torch.cat(self._outputs)
        if outputs.shape[1] > 1:
            return list(outputs.argmax(1).tolist())
        if are_values is None:
            labels = self.labels
            are_values = labels is None or not all(isinstance(label, int) for label in labels)
        return list(outputs[:, 0].tolist() if are_values else (outputs[:, 0] > 0).long().tolist())

    def margin(self) -> Tensor | None:
        """Return the difference of the two largest probabilities, shape (N,).

        Outputs are taken for logits of classes, or for their probabilities if they sum to one. None where that cannot be:
        where labels are values, or a single output is to tell more than two.
        """
        outputs, labels = torch.cat(self._outputs).double(), self.labels
        numbers = labels is not None and all(isinstance(label, int) for label in labels)
        two = numbers and all(label in (0, 1) for label in labels or [])
        listed = labels is not None and any(isinstance(label, float) for label in labels)
        if (self._has_values and not two) or listed or (outputs.shape[1] == 1 and not two):
            return None
        largest = _probabilities(outputs).topk(2, 1).values
        return largest[:, 0] - largest[:, 1]

    def _pictures(self, inputs: Any, size: int) -> list[Any] | None:
        """Return something small to show each sample by, None if there is nothing or no room left."""
        if self._shown is None or inputs is None:
            return None
        if self._render is not None:
            pictures = [self._render(inputs[row]) for row in range(size)]
        elif isinstance(inputs, Tensor):
            small = _small(inputs) if len(inputs) == size else None
            pictures = [] if small is None else list(small.unbind(0))
        else:
            pictures = list(inputs) if isinstance(inputs, Sequence) and all(isinstance(i, str) for i in inputs) else []
        if len(pictures) != size:
            return None
        self._room -= sum(picture.nbytes if isinstance(picture, Tensor) else len(str(picture)) for picture in pictures)
        return pictures if self._room > 0 else None


def are_classes(labels: Sequence[Any] | None) -> bool:
    """Return whether labels can be classes: integers or names."""
    return labels is not None and all(isinstance(label, (int, str)) for label in labels)


def _probabilities(outputs: Tensor) -> Tensor:
    """Return the probabilities of classes, shape (N, C): two of a single logit; outputs that are probabilities are kept."""
    if outputs.shape[1] == 1:
        return torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], 1)
    known = outputs.where(outputs != torch.inf, torch.nan)  # A logit of -inf rules a class out.
    rows = known[~known.isnan().any(1)]
    sums_to_one = len(rows) > 0 and bool((rows >= 0).all()) and torch.allclose(rows.sum(1), rows.new_ones(()), atol=1e-4)
    return known if sums_to_one else known.softmax(1)


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


def _extend(column: list[Any] | None, values: list[Any] | None) -> list[Any] | None:
    """Extend a column; once a chunk lacks it, there is no such column."""
    if column is None or values is None:
        return None
    column.extend(values)
    return column


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
