"""Frozen records that travel upwards: from functions and estimators to tables, loggers and reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NeighborCountResult:
    """Neighbor counts of Q query samples over N reference samples.

    Attributes:
        soft: shape (Q,), Σ_j k(x_i, x_j), in [-N, N]; NaN for a sample that was left out.
        num_reference: N, the number of reference samples with a usable gradient.
        hard: for each threshold τ, shape (Q,), #{j : k(x_i, x_j) ≥ τ}.
        power: for each exponent α, shape (Q,), Σ_j max(k(x_i, x_j), 0)^α.
    """

    soft: Tensor
    num_reference: int
    hard: dict[float, Tensor] = field(default_factory=dict)
    power: dict[float, Tensor] = field(default_factory=dict)

    @property
    def fraction(self) -> Tensor:
        """Return N_S / N, shape (Q,), in [-1, 1]: the share of the reference set that the network sees as the same."""
        return self.soft / self.num_reference


@dataclass(frozen=True, eq=False)
class KernelNeighborsResult:
    """The k nearest reference samples of each of Q query samples under the kernel, nearest first.

    Attributes:
        similarity: shape (Q, k), float, descending; NaN where there is no neighbor (a sample that was left out).
        index: shape (Q, k), int64, positions in the reference set; -1 where there is no neighbor.
        recall: the share of the true k neighbors found, in [0, 1]: 1.0 for an exact search, measured on random queries
            for a sketched one, None where it was not measured.
    """

    similarity: Tensor
    index: Tensor
    recall: float | None = None
