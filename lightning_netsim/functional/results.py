"""Frozen records that functions and estimators return."""

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
        hard_error: for each τ, the root mean square error of the hard counts, measured on random queries where these are
            estimates from sketches; 0 where they are exact.
        power_error: the same of the power counts, for each α.
    """

    soft: Tensor
    num_reference: int
    hard: dict[float, Tensor] = field(default_factory=dict)
    power: dict[float, Tensor] = field(default_factory=dict)
    hard_error: dict[float, float] = field(default_factory=dict)
    power_error: dict[float, float] = field(default_factory=dict)

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


@dataclass(frozen=True, eq=False)
class ClassSimilarityResult:
    """How similar the C classes of a reference set are.

    Attributes:
        classes: their labels, ascending.
        num_samples: shape (C,), int64, how many samples each has.
        similarity: shape (C, C), symmetric, the mean of k over all pairs of two classes, in [-1, 1]; within a class over pairs
            of different samples, NaN where there is only one.
    """

    classes: list[int | str]
    num_samples: Tensor
    similarity: Tensor


@dataclass(frozen=True, eq=False)
class LabelDenoisingResult:
    """What a network makes of the labels of N reference samples at each of Q query samples; NaN for one that was left out.

    Attributes:
        smoothed_targets: shape (Q, D), E_k[ỹ], labels averaged over the kernel neighbors.
        smoothed_outputs: shape (Q, D), E_k[ŷ], outputs averaged likewise.
        consistency: shape (Q,), ‖ŷ_i − E_k[ŷ]‖, in the units of the outputs.
        factor: shape (Q,), the denoising factor √(Σ_j ‖a_ij‖²_F / D), at least 1/√N.
        factor_error: the relative standard error of `factor` at most; 0 where all pairs were compared.
        residual: shape (Q, D), Σ_j K(x_i, x_j)(ŷ_j − ỹ_j): 0 at a minimum of the loss.
        num_reference: N, the number of reference samples with finite gradients and labels.
        spread: shape (Q, D), E_k[√(1 − k^C)] of each output by itself; None for the matrix kernel.
        clamped: shape (D,), the share of pairs with a negative kernel, which were put to 0; None for the matrix kernel.
        bound: shape (Q, D), √2 C times `spread`; None where the Lipschitz constant is not known.
        lipschitz: shape (D,), C; None likewise.
    """

    smoothed_targets: Tensor
    smoothed_outputs: Tensor
    consistency: Tensor
    factor: Tensor
    factor_error: float
    residual: Tensor
    num_reference: int
    spread: Tensor | None = None
    clamped: Tensor | None = None
    bound: Tensor | None = None
    lipschitz: Tensor | None = None
