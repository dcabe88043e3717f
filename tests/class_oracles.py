"""Means of similarities over pairs of classes, by loops over all pairs in float64, and processes played by threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_netsim.data.processes import Processes


def kept(similarity: Tensor) -> list[int]:
    """Return the samples of a square table that were not left out: those that are similar to themselves."""
    return [i for i in range(len(similarity)) if not math.isnan(float(similarity[i, i]))]


def mean(values: Sequence[float]) -> float:
    """Return the mean of some numbers; NaN of none."""
    return sum(values) / len(values) if values else math.nan


def class_table(similarity: Tensor, labels: Sequence[Any]) -> tuple[list[Any], list[int], Tensor]:
    """Return the classes, how many samples each has, and the mean k of each two: within one, of different samples.

    Args:
        similarity: shape (N, N), NaN in rows and columns of samples that were left out.
        labels: N of them.
    """
    valid = kept(similarity)
    present = {labels[i] for i in valid}
    classes = sorted(label for label in present if not isinstance(label, str))
    classes += sorted(label for label in present if isinstance(label, str))
    members = {label: [i for i in valid if labels[i] == label] for label in classes}
    table = [
        [mean([float(similarity[i, j]) for i in members[a] for j in members[b] if i != j]) for b in classes] for a in classes
    ]
    return classes, [len(members[label]) for label in classes], torch.tensor(table, dtype=torch.float64)


def class_means(
    similarity: Tensor, labels: Sequence[Any], reference_labels: Sequence[Any], same: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean k of each query to the samples of its class, and to those of the others, shape (Q,).

    Args:
        similarity: shape (Q, N), NaN for pairs with a sample that was left out.
        labels: of the Q queries.
        reference_labels: of the N reference samples.
        same: whether query i is reference sample i, which is then not compared with itself.
    """
    own, others = [], []
    for i, label in enumerate(labels):
        row = [(j, float(similarity[i, j])) for j in range(similarity.shape[1])]
        row = [(j, value) for j, value in row if not math.isnan(value) and not (same and i == j)]
        own.append(mean([value for j, value in row if reference_labels[j] == label]))
        others.append(mean([value for j, value in row if reference_labels[j] != label]))
    return torch.tensor(own, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)


def class_sums(similarity: Tensor, labels: Sequence[Any], reference_labels: Sequence[Any]) -> Tensor:
    """Return Σ k of each query over all reference samples of its class, itself included, shape (Q,); NaN where left out."""
    sums = []
    for i, label in enumerate(labels):
        row = [float(similarity[i, j]) for j in range(similarity.shape[1])]
        usable = [value for value in row if not math.isnan(value)]
        chosen = [value for value, other in zip(row, reference_labels, strict=True) if other == label]
        sums.append(sum(value for value in chosen if not math.isnan(value)) if usable else math.nan)
    return torch.tensor(sums, dtype=torch.float64)


T = TypeVar("T")


class Together(Processes):
    """One of several processes, each a thread."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, size)
        self._meeting, self._table = meeting, table

    def gather(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._meeting.wait(30)
        gathered = list(self._table)
        self._meeting.wait(30)
        return gathered

    def sum(self, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for held in self.gather(dict(tensors)):
            for name, value in held.items():
                total[name] = total[name] + value if name in total else value.clone()
        return total


def in_threads(work: Callable[[Processes], Any], number: int) -> None:
    """Do the same work in several processes at a time."""
    meeting, table = threading.Barrier(number), [None] * number
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(Together(rank, number, meeting, table))
        except BaseException as error:
            failed.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
