"""Count the neighbors of every sample, exactly, from one sum over the reference set."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.data.processes import Processes
from lightning_netsim.functional.results import NeighborCountResult
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, FeatureSum


class NeighborCount:
    """Count soft neighbors in two sweeps and O(P·d) memory: they are linear in the features.

    N_S(x) = Σ_j k(x, x_j) = ⟨φ(x), S⟩ with S = Σ_j φ(x_j), the sample itself included where it is in the reference set.
    `update` with every batch of the reference set, then `query` with every batch of the query set, then `compute`. Hard and
    power counts need all pairs: see `AllPairs`.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 4.

    Example:
        >>> from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
        >>> features, count = DenseFeatureBatch(torch.eye(3)), NeighborCount()
        >>> count.update(features)
        >>> _ = count.query(features)
        >>> count.compute().soft
        tensor([1., 1., 1.])
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._total: FeatureSum = {}
        self._num_reference = 0
        self._answers: list[Tensor] = []

    def update(self, reference: AbstractFeatureBatch) -> None:
        """Add a batch of the reference set."""
        self.add(reference.sum(), int(reference.valid.sum()))

    def add(self, total: FeatureSum, num_samples: int) -> None:
        """Add the sum of the features of `num_samples` valid samples of the reference set."""
        for name, value in total.items():
            self._total[name] = self._total[name] + value if name in self._total else value
        self._num_reference += num_samples

    def merge(self, processes: Processes) -> None:
        """Make the reference sets of all processes one, after each has been updated with its part."""
        self._total = processes.sum(self._total)
        self._num_reference = sum(processes.gather(self._num_reference))

    @property
    def total(self) -> FeatureSum:
        """Return S = Σ_j φ(x_j).

        Raises:
            ValueError: if there is no reference set.
        """
        if not self._total:
            raise expected("reference", "updated with at least one batch", "none", "Call `update` before `query`.")
        return self._total

    @property
    def num_reference(self) -> int:
        """Return N, the number of valid samples of the reference set."""
        return self._num_reference

    def query(self, queries: AbstractFeatureBatch) -> Tensor:
        """Count the neighbors of a batch of the query set; return the soft counts, shape (B,), NaN where left out.

        Raises:
            ValueError: if there is no reference set.
        """
        soft = queries.dot(self.total)
        self._answers.append(soft)
        return soft

    def compute(self) -> NeighborCountResult:
        """Return the counts of all queries so far, in the order in which they were asked."""
        return NeighborCountResult(torch.cat(self._answers), self._num_reference)

    def squared_norm(self) -> float:
        """Return ‖S‖², which equals Σ N_S over the reference set: a check that the two sweeps agree."""
        return sum(float(value.double().square().sum()) for value in self._total.values())
