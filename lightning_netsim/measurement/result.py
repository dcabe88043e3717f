"""What one measurement found, and of which samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_netsim.functional.results import ClassSimilarityResult, KernelNeighborsResult, NeighborCountResult


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
    seconds: float = 0.0
    margin: Tensor | None = None
    classes: ClassSimilarityResult | None = None
    same_class: Tensor | None = None
    other_class: Tensor | None = None

    @property
    def compares_with_itself(self) -> bool:
        """Return whether query and reference are the same set."""
        return self.queries is self.reference
