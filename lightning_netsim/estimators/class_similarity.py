"""How similar classes are to each other, and every sample to its own: from one sum of features for each class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.data.labels import ClassLabel
from lightning_netsim.data.processes import Processes
from lightning_netsim.functional._precision import to_double
from lightning_netsim.functional.results import ClassSimilarityResult
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, FeatureSum

#: Of more different labels than this, no similarities are kept: their number grows with the square.
MAX_CLASSES = 300

# Entries that are brought to float64 at a time.
_ELEMENTS = 2**22

#: For each class, the sum of the features of some samples, and how many they are.
ClassSums = dict[ClassLabel, tuple[FeatureSum, int]]


class ClassSimilarity:
    """Average the similarity within and between classes exactly, in two sweeps and O(C·P·d) memory: no pair is formed.

    With S_a = Σ_{j in a} φ(x_j), the mean of k over all pairs of two classes is ⟨S_a, S_b⟩ / (n_a n_b), within a class, a
    sample with itself not counted, (‖S_a‖² − n_a) / (n_a (n_a − 1)), and a sample's similarities to class a sum to
    ⟨φ(x), S_a⟩. `update` with every batch of the reference set, then `query` with every batch of the query set, then `compute`.

    Args:
        limit: bytes that the sums may take; beyond, or for more than 300 classes, they are given up, and `compute` returns
            None.

    Source: the sums of Charpiat et al., NeurIPS 2019, section 4, class by class.

    Example:
        >>> from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
        >>> features = DenseFeatureBatch(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        >>> classes = ClassSimilarity()
        >>> classes.update(features, ["a", "a", "b"])
        >>> classes.query(features, ["a", "a", "b"])
        tensor([2., 2., 1.])
        >>> classes.compute().similarity
        tensor([[1., 0.],
                [0., nan]])
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._sums: ClassSums | None = {}
        self._bytes = 0

    @property
    def is_kept(self) -> bool:
        """Return whether the sums are kept: there are classes, and these fit into the limit."""
        return self._sums is not None

    @property
    def nbytes(self) -> int:
        """Return the bytes that the sums take, or took when they were given up."""
        return self._bytes

    def drop(self) -> None:
        """Give the sums up."""
        self._sums = None

    def sums(self, features: AbstractFeatureBatch, labels: Sequence[ClassLabel]) -> ClassSums:
        """Return the sums of a batch, without adding them; nothing where there is no room for them, and all are given up.

        Args:
            features: those of B samples.
            labels: B classes.

        Raises:
            ValueError: if there are not B labels.
        """
        return {label: (features.select(rows).sum(), len(rows)) for label, rows in self._groups(features, labels).items()}

    def update(self, reference: AbstractFeatureBatch, labels: Sequence[ClassLabel]) -> None:
        """Add a batch of the reference set with its B labels.

        Raises:
            ValueError: if there are not B labels.
        """
        # Class by class: with the sums that are held, only one more is in memory.
        for label, rows in self._groups(reference, labels).items():
            self.add({label: (reference.select(rows).sum(), len(rows))})

    def add(self, sums: ClassSums) -> None:
        """Add the sums of some samples of the reference set."""
        if self._sums is None:
            return
        for label, (total, number) in sums.items():
            held, count = self._sums.get(label, ({}, 0))
            for name, value in total.items():
                if name in held:
                    held[name] += value
                else:
                    held[name] = value.clone()
                    self._bytes += value.nbytes
            self._sums[label] = (held, count + number)
        if self._bytes > self.limit or len(self._sums) > MAX_CLASSES:
            self.drop()

    def _groups(self, features: AbstractFeatureBatch, labels: Sequence[ClassLabel]) -> dict[ClassLabel, Tensor]:
        """Return the rows of each class among the valid samples; nothing if the sums do not fit, before any is formed."""
        groups = _rows_by_class(features, labels)
        if self._sums is None:
            return {}
        number = len({*self._sums, *groups})
        if number * features.sum_nbytes > self.limit or number > MAX_CLASSES:
            self._bytes = max(self._bytes, number * features.sum_nbytes)
            self.drop()
            return {}
        return groups

    def merge(self, processes: Processes) -> None:
        """Make the reference sets of all processes one, after each has been updated with its part."""
        own = self._sums
        kept = processes.gather(None if own is None else ({label: count for label, (_, count) in own.items()}, self._bytes))
        counts: Counter[ClassLabel] = Counter()
        size = 0.0
        for held, nbytes in (part for part in kept if part is not None):
            size = max(size, nbytes / max(1, len(held)))
            counts.update(held)
        self._bytes = max(self._bytes, round(size * len(counts)))
        if own is None or None in kept or self._bytes > self.limit or len(counts) > MAX_CLASSES:
            self.drop()
            return
        device = next((value.device for total, _ in own.values() for value in total.values()), None)
        # Every process asks for the classes in the same order.
        self._sums = {label: (processes.sum(own.get(label, ({}, 0))[0], device), counts[label]) for label in _ordered(counts)}

    def query(self, queries: AbstractFeatureBatch, labels: Sequence[ClassLabel]) -> Tensor:
        """Return the sum of each query's similarities to the samples of its class, shape (B,); NaN where left out.

        Args:
            queries: the features of B samples.
            labels: B classes.

        Raises:
            ValueError: if there are not B labels, or the sums were given up.
        """
        if self._sums is None:
            raise expected("limit", f"at least {self._bytes:,} bytes for the sums of the classes", f"{self.limit:,.0f}")
        groups = _rows_by_class(queries, labels)
        own = queries.norm.new_zeros(sum(map(len, groups.values())))
        for label, rows in groups.items():
            if label in self._sums:
                own[rows.to(own.device)] = queries.select(rows).dot(self._sums[label][0])
        return queries.spread(own)

    def means(
        self, own: Tensor, soft: Tensor, labels: Sequence[ClassLabel], is_reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the mean similarity of each query to the samples of its class, and to those of all others, shape (Q,).

        Args:
            own: shape (Q,), what `query` returned.
            soft: shape (Q,), the soft counts of the same samples.
            labels: Q classes.
            is_reference: whether they are samples of the reference set: each is then not compared with itself.

        Returns:
            both in [-1, 1]; NaN where the class has no (other) sample, or there is no other class.
        """
        counts = {label: count for label, (_, count) in (self._sums or {}).items()}
        same = torch.tensor([counts.get(label, 0) for label in labels], dtype=torch.float64)
        others = sum(counts.values()) - same
        own, soft = own.double().cpu(), soft.double().cpu()
        compared = same - float(is_reference)
        mean = (own - float(is_reference)) / compared.masked_fill(compared <= 0, torch.nan)
        return mean.float(), ((soft - own) / others.masked_fill(others <= 0, torch.nan)).float()

    def compute(self) -> ClassSimilarityResult | None:
        """Return the similarity of the classes; None where there are none, or the sums were given up."""
        if not self._sums:
            return None
        classes = _ordered(self._sums)
        counts = torch.tensor([self._sums[label][1] for label in classes])
        sums = [self._sums[label][0] for label in classes]
        inner = torch.zeros(len(sums), len(sums), dtype=torch.float64)
        for name in dict.fromkeys(name for each in sums for name in each):
            # A parameter that the sum of a class lacks counts as zero there.
            rows = torch.tensor([place for place, each in enumerate(sums) if name in each])
            held = [sums[place][name].flatten() for place in rows.tolist()]
            width = max(1, _ELEMENTS // len(rows))
            for start in range(0, len(held[0]), width):
                block = to_double(torch.stack([row[start : start + width] for row in held]))
                inner[rows.unsqueeze(1), rows] += (block @ block.mT).to(inner)
        within = counts * (counts - 1)
        diagonal = (inner.diagonal() - counts) / within.double().masked_fill(within == 0, torch.nan)
        similarity = (inner / (counts.unsqueeze(1) * counts)).diagonal_scatter(diagonal)
        return ClassSimilarityResult(classes, counts, similarity.float())


def _rows_by_class(features: AbstractFeatureBatch, labels: Sequence[ClassLabel]) -> dict[ClassLabel, Tensor]:
    """Return the rows of each class among the valid samples."""
    if len(labels) != len(features.valid):
        raise expected("labels", f"{len(features.valid)} classes, one for each sample", f"{len(labels)}")
    groups: dict[ClassLabel, list[int]] = {}
    valid = [label for label, valid in zip(labels, features.valid.tolist(), strict=True) if valid]
    for row, label in enumerate(valid):
        groups.setdefault(label, []).append(row)
    return {label: torch.tensor(rows) for label, rows in groups.items()}


def _ordered(labels: Iterable[ClassLabel]) -> list[ClassLabel]:
    """Return classes in their natural order, numbers before names."""
    return sorted(labels, key=lambda label: (isinstance(label, str), label))
