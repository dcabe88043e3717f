"""The sums over a reference set, whole and class by class, and what every query makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_netsim.data.batches import SimilarityBatch, as_column
from lightning_netsim.data.labels import ClassLabel, are_classes, are_few
from lightning_netsim.data.processes import Processes
from lightning_netsim.estimators import ClassSimilarity, NeighborCount
from lightning_netsim.estimators.class_similarity import MAX_CLASSES, ClassSums
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, FeatureSum, UnitFeatureBatch
from lightning_netsim.measurement.plan import TILE
from lightning_netsim.measurement.swept_set import SweptSet, joined_ids

# What the sums of classes may take of the budget.
_CLASSES_SHARE = 1 / 8
_NO_ROOM = (
    "The similarity of classes is left out: the sums of their gradients take more than an eighth of the memory budget. "
    "Choose a larger `memory_budget`, fewer `directions` or fewer `parameters`."
)


@dataclass(frozen=True)
class Summed:
    """The sum of the features of a chunk, and that of each class where it is made in passing."""

    total: FeatureSum
    by_class: ClassSums


@dataclass(frozen=True)
class Counted:
    """The soft counts of a chunk, and the sums of its similarities to its own classes, shape (B,); None if there are none."""

    soft: Tensor
    own: Tensor | None


class Counting:
    """What is counted in one measurement: `sum` and `add` chunks of the reference set, `merge`, `ask` and `take` queries.

    Args:
        budget: bytes that features may take in all.
        in_passing: whether the sums of classes are made chunk by chunk; else from what is stored of the reference set, which
            is faster.

    Attributes:
        count: the sum over the reference set.
        classes: the sums over its classes.
    """

    def __init__(self, budget: float, in_passing: bool) -> None:
        self.count = NeighborCount()
        self.classes = ClassSimilarity(_CLASSES_SHARE * budget)
        self._in_passing = in_passing
        self._soft: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._labels: dict[int, ClassLabel] = {}
        self._notes: set[str] = set()

    @property
    def notes(self) -> set[str]:
        """Return what the user should know."""
        return {_NO_ROOM} if self.classes.nbytes > self.classes.limit else self._notes

    @property
    def soft(self) -> tuple[Tensor, Tensor]:
        """Return the soft counts of the queries so far, and their ids."""
        return _joined(self._soft)

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Return the sums of their similarities to their own classes, and their ids; empty if there are no classes."""
        return _joined(self._own)

    def sum(self, features: AbstractFeatureBatch, read: SimilarityBatch) -> Summed:
        """Return the sums of a chunk of the reference set, without adding them."""
        labels = _class_labels(read) if self._in_passing and self.classes.is_kept else None
        return Summed(features.sum(), {} if labels is None else self.classes.sums(features, labels))

    def add(self, summed: Summed, num_samples: int) -> None:
        """Add the sums of a chunk with so many valid samples."""
        self.count.add(summed.total, num_samples)
        self.classes.add(summed.by_class)

    def merge(self, reference: SweptSet, processes: Processes) -> None:
        """Complete the sums after the first sweep over the reference set, and make those of all processes one."""
        self.count.merge(processes)
        labels = reference.table.class_labels()
        self._labels = labels or {}
        held = processes.gather(None if labels is None else (set(labels.values()), len(labels)))
        known = [part for part in held if part is not None]
        number = len(set().union(*(names for names, _ in known)))
        classified = len(known) == len(held)
        if classified and not (number <= MAX_CLASSES and are_few(number, sum(count for _, count in known))):
            self._notes.add(f"The similarity of classes is left out: there are {number:,} different labels.")
            classified = False
        if not classified:
            self.classes.drop()
        if self.classes.is_kept and not self._in_passing:
            for features, ids in reference.store.blocks(TILE):
                self.classes.update(UnitFeatureBatch(features), self._labels_of(ids))
        self.classes.merge(processes)

    def ask(self, features: AbstractFeatureBatch, read: SimilarityBatch) -> Counted:
        """Return the counts of some queries, without taking them."""
        return self._ask(features, _class_labels(read))

    def take(self, counted: Counted, valid: Tensor, ids: Tensor) -> None:
        """Take the counts of the valid ones of some queries; `ids` are those of the valid ones."""
        self._soft.append((counted.soft[valid], ids))
        if counted.own is not None:
            self._own.append((counted.own[valid], ids))

    def take_reference(self, features: AbstractFeatureBatch, ids: Tensor) -> None:
        """Take the counts of samples of the reference set, which are queries too."""
        self.take(self._ask(features, self._labels_of(ids) if self._labels else None), features.valid, ids)

    def _ask(self, features: AbstractFeatureBatch, labels: list[ClassLabel] | None) -> Counted:
        own = self.classes.query(features, labels) if labels is not None and self.classes.is_kept else None
        return Counted(features.dot(self.count.total), own)

    def _labels_of(self, ids: Tensor) -> list[ClassLabel]:
        return [self._labels[position] for position in ids.tolist()]


def _class_labels(read: SimilarityBatch) -> list[ClassLabel] | None:
    """Return the labels of a batch; None if they are no classes."""
    labels = as_column(read.labels, len(read.outputs), "labels")
    return labels if are_classes(labels) else None


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([torch.zeros(0), *(values.cpu() for values, _ in pairs)]), joined_ids(pairs)
