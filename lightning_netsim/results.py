"""Frozen records that travel upwards: from functions and estimators to tables, loggers and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
class SampleSet:
    """What is known of the samples of a set, in the order of the set.

    Attributes:
        index: shape (N,), int64, the position of each sample in the data set.
        ids: N names of the samples; None where the position is the name.
        labels: N labels; None if there are none.
        dataloader: shape (N,), int64, the number of the loader that a sample came from.
        shown: N small pictures or texts to show the samples by; None if there are none.
    """

    index: Tensor
    ids: list[Any] | None
    labels: list[Any] | None
    dataloader: Tensor
    shown: list[Any] | None


#: The label of a class.
ClassLabel = int | str


@dataclass(frozen=True, eq=False)
class ClassSimilarityResult:
    """How similar the C classes of a reference set are.

    Attributes:
        classes: their labels, ascending.
        num_samples: shape (C,), int64, how many samples each has.
        similarity: shape (C, C), symmetric, the mean of k over all pairs of two classes, in [-1, 1]; within a class over pairs
            of different samples, NaN where there is only one.
    """

    classes: list[ClassLabel]
    num_samples: Tensor
    similarity: Tensor


@dataclass(frozen=True, eq=False)
class SimilarityResult:
    """Everything one measurement found.

    Attributes:
        counts: neighbor counts of the query set.
        neighbors: kernel neighbors; their `index` is a position in the data set of the reference.
        activation_neighbors: neighbors under activations, for comparison; None if they were not asked for.
        queries: the query set, Q samples.
        reference: the reference set, N samples; the same object as `queries` where a set is compared with itself.
        predictions: Q predicted classes (or values, where D = 1 and labels are not classes).
        norm: shape (Q,), ‖G(x)‖_F.
        rank: shape (Q,), int64, rank of C(x); 0 for a sample that was left out.
        num_left_out: the number of samples of both sets without a usable gradient.
        num_directions: d.
        plan: how it was computed: kind, chunk size, number of features, bytes, methods.
        similarity_error: root mean square error of listed similarities on the audited queries; 0 if exact.
        sweep_disagreement: |Σ N_S − ‖S‖²| / ‖S‖² where a set is compared with itself: the sweeps saw the same network.
        notes: remarks on the outputs, for the user.
        seconds: how long it took.
        margin: shape (Q,), the difference of the two largest probabilities; None for a single output that is a value.
        classes: similarity of classes of the reference; None where labels are no classes, or their sums did not fit.
        same_class: shape (Q,), the mean of k to the (other) samples of the query's class; NaN where there is none.
        other_class: shape (Q,), the mean of k to the samples of all other classes; NaN where there is none.
    """

    counts: NeighborCountResult
    neighbors: KernelNeighborsResult
    activation_neighbors: KernelNeighborsResult | None
    queries: SampleSet
    reference: SampleSet
    predictions: list[Any]
    norm: Tensor
    rank: Tensor
    num_left_out: int
    num_directions: int
    plan: dict[str, Any]
    similarity_error: float | None
    sweep_disagreement: float | None
    notes: tuple[str, ...]
    seconds: float
    margin: Tensor | None = None
    classes: ClassSimilarityResult | None = None
    same_class: Tensor | None = None
    other_class: Tensor | None = None

    @property
    def compares_with_itself(self) -> bool:
        """Return whether query and reference are the same set."""
        return self.queries is self.reference


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
