"""Count the neighbors of every sample, exactly, from one sum over the reference set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_netsim._checks import check_numbers, expected
from lightning_netsim.features import AbstractFeatureBatch, FeatureSum
from lightning_netsim.functional import neighbor_count
from lightning_netsim.results import NeighborCountResult


class NeighborCount:
    """Count neighbors in two sweeps and O(P·d) memory: soft counts are linear in the features.

    N_S(x) = Σ_j k(x, x_j) = ⟨φ(x), S⟩ with S = Σ_j φ(x_j), the sample itself included where it is in the reference set.
    `update` with every batch of the reference set, then `query` with every batch of the query set, then `compute`.

    Hard counts #{j : k ≥ τ} and power counts Σ_j max(k, 0)^α need all pairs: with them, the features of the reference set are
    kept as vectors, N·d·P numbers.

    Args:
        thresholds: τ of the hard counts, in [-1, 1].
        powers: α of the power counts, above 0.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 4.

    Example:
        >>> from lightning_netsim.features import DenseFeatureBatch
        >>> features, count = DenseFeatureBatch(torch.eye(3)), NeighborCount()
        >>> count.update(features)
        >>> _ = count.query(features)
        >>> count.compute().soft
        tensor([1., 1., 1.])
    """

    def __init__(self, thresholds: Iterable[float] = (), powers: Iterable[float] = ()) -> None:
        self.thresholds = check_numbers("thresholds", thresholds, -1.0, 1.0)
        self.powers = check_numbers("powers", powers, 1e-6)
        self.reset()

    @property
    def needs_vectors(self) -> bool:
        """Return whether the reference features have to be kept as vectors."""
        return bool(self.thresholds or self.powers)

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._total: FeatureSum = {}
        self._num_reference = 0
        self._vectors: list[Tensor] = []
        self._answers: list[NeighborCountResult] = []

    def update(self, reference: AbstractFeatureBatch) -> None:
        """Add a batch of the reference set."""
        for name, value in reference.sum().items():
            self._total[name] = self._total[name] + value if name in self._total else value
        self._num_reference += int(reference.valid.sum())
        if self.needs_vectors:
            self._vectors.append(reference.vectors())

    def query(self, queries: AbstractFeatureBatch) -> Tensor:
        """Count the neighbors of a batch of the query set; return the soft counts, shape (B,), NaN where left out.

        Raises:
            ValueError: if there is no reference set.
        """
        if not self._total:
            raise expected("reference", "updated with at least one batch", "none", "Call `update` before `query`.")
        soft = queries.dot(self._total)
        if self.needs_vectors:
            self._vectors = [torch.cat(self._vectors)]
            counts = neighbor_count(queries.vectors(), self._vectors[0], self.thresholds, self.powers)
            hard = {key: queries.spread(value) for key, value in counts.hard.items()}
            power = {key: queries.spread(value) for key, value in counts.power.items()}
        else:
            hard, power = {}, {}
        self._answers.append(NeighborCountResult(soft, self._num_reference, hard, power))
        return soft

    def compute(self) -> NeighborCountResult:
        """Return the counts of all queries so far, in the order in which they were asked."""
        answers = self._answers
        return NeighborCountResult(
            torch.cat([answer.soft for answer in answers]),
            self._num_reference,
            {key: torch.cat([answer.hard[key] for answer in answers]) for key in self.thresholds},
            {key: torch.cat([answer.power[key] for answer in answers]) for key in self.powers},
        )

    def squared_norm(self) -> float:
        """Return ‖S‖², which equals Σ N_S over the reference set: a check that the two sweeps agree."""
        return sum(float(value.double().square().sum()) for value in self._total.values())
