"""Criteria that make a network treat given inputs as the same thing, as modules: gradients of a batch in, a scalar out.

Each computes a function of `lightning_netsim.functional.similarity`; what it adds is the fast way there from the factored
gradients of a batch, which are not formed as one matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, expected
from lightning_netsim.data.trees import batch_size, take
from lightning_netsim.functional import similarity as functional
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.losses.criterion import AbstractCriterion
from lightning_netsim.losses.gradient_batch import GradientBatch
from lightning_netsim.losses.kernel_sums import kernel_energies, kernel_sums, pair_similarity


class AbstractSimilarityLoss(AbstractCriterion):
    """A criterion to be minimized, computed from the gradients of a batch.

    Attributes:
        directions: which functions of the outputs are differentiated by default, see `Directions`: "contrast" for criteria
            that compare samples of one class, one random direction for others.
    """

    directions: ClassVar[str | int] = 1

    def forward(self, batch: GradientBatch) -> Tensor:
        """Return the criterion, a scalar on the graph; zero, on the graph, where nothing can be compared."""
        if batch_size(batch.inputs) == 0:
            return batch.zero()
        with full_float32():
            criterion = self.compute(batch)
            # Where the gradients do not depend on the parameters, as those of a linear model, it is a constant.
            return criterion if criterion.requires_grad else criterion + batch.zero()

    @abstractmethod
    def compute(self, batch: GradientBatch) -> Tensor:
        """Return the criterion, a scalar; zero where nothing can be compared."""


class PairSimilarityLoss(AbstractSimilarityLoss):
    """Compute −mean k(x_i, x'_i), each sample paired with the next one of its label in the batch.

    n samples of one label form n pairs in a circle (two form one pair). To compare given pairs, label them: the i-th pair by i,
    with directions other than "contrast", which takes labels for classes.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> loss = PairSimilarityLoss()(GradientBatch(operator, torch.ones(4, 3), torch.tensor([0, 0, 1, 1])))
        >>> round(loss.item(), 5)
        -1.0
    """

    directions = "contrast"

    def compute(self, batch: GradientBatch) -> Tensor:
        batch.all_gradients.hold_formed()
        pairs = []
        for members in batch.groups(batch.usable).unbind(1):
            samples = members.nonzero().squeeze(1)
            circle = torch.stack([samples, samples.roll(-1)])
            pairs.append(circle if len(samples) > 2 else circle[:, :1])
        if not pairs:
            return batch.zero()
        first, second = torch.cat(pairs, 1)
        return functional.pair_similarity_loss(pair_similarity(batch.jacobian.select(first), batch.jacobian.select(second)))


class GroupSimilarityLoss(AbstractSimilarityLoss):
    """Compute minus the mean similarity of all pairs of samples of one label, averaged over the labels in the batch.

    For a label with n samples the mean is n/(n−1) ‖μ‖² − 1/(n−1), with μ the mean of their unit gradients: exact, all pairs,
    without their (B, B) similarities. Labels with a single sample do not count.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> loss = GroupSimilarityLoss()(GradientBatch(operator, torch.ones(4, 3), torch.tensor([0, 0, 1, 1])))
        >>> round(loss.item(), 5)
        -1.0
    """

    directions = "contrast"

    def compute(self, batch: GradientBatch) -> Tensor:
        members = batch.groups(batch.usable)
        if not members.shape[1]:
            return batch.zero()
        sizes = members.sum(0)
        squared_norms = kernel_energies(batch.jacobian, members, batch.unit) / sizes.square()
        return -functional.group_mean_similarity(squared_norms, sizes).mean()


class MinibatchSimilarityLoss(AbstractSimilarityLoss):
    """Compute n_B ‖μ₁ − μ₂‖² / (‖μ₁‖ ‖μ₂‖) from two halves of the samples of each label, averaged over the labels.

    μ is the mean of the gradients as they are, not normalized sample by sample: what the paper used where gradients of single
    samples were out of reach. Prefer `GroupSimilarityLoss`, unless this very criterion is wanted.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> loss = MinibatchSimilarityLoss()(GradientBatch(operator, torch.ones(4, 3), torch.tensor([0, 0, 1, 1])))
        >>> loss.item()
        0.0
    """

    directions = "contrast"

    def compute(self, batch: GradientBatch) -> Tensor:
        finite = batch.all_gradients.finite()
        halves: list[Tensor] = []
        for members in batch.groups(finite).unbind(1):
            samples = members.nonzero().squeeze(1)
            half = len(samples) // 2
            halves += [samples[:half], samples[half : 2 * half]]
        if not halves:
            return batch.zero()
        means = [_mean_gradient(some) for some in batch.gradients_of(finite).split(halves)]
        pairs = zip(means[::2], means[1::2], halves[::2], strict=True)
        terms = [functional.minibatch_similarity_loss(first, second, len(samples)) for first, second, samples in pairs]
        return torch.stack(terms).mean()


class DensityLoss(AbstractSimilarityLoss):
    """Compute Σ_i (N_S(x_i)/n − q)² over the n samples of a batch, or the squared distance of N_S/n from a range.

    N_S(x_i) = Σ_j k(x_i, x_j) counts the neighbors within the batch, x_i itself included, so N_S/n is never below about 1/n.

    Args:
        target: q in [0, 1], or a range (q₁, q₂).
        reduction: "mean" over the samples, or their "sum" as in the paper.

    Raises:
        ValueError: for a value out of range.

    Source: Charpiat et al., NeurIPS 2019, section 4.2 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> loss = DensityLoss(target=0.5)(GradientBatch(operator, torch.ones(4, 3)))
        >>> round(loss.item(), 5)
        0.25
    """

    def __init__(self, target: float | list[float] = 0.1, reduction: str = "mean") -> None:
        super().__init__()
        functional.density_range(target)
        self.target = target
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))

    def compute(self, batch: GradientBatch) -> Tensor:
        size = batch.jacobian.num_samples
        if not size:
            return batch.zero()
        counts = kernel_sums(batch.jacobian, batch.outputs.new_ones(size, 1), batch.unit).squeeze(1)
        return functional.density_loss(counts / size, self.target, self.reduction)


class InvarianceLoss(AbstractSimilarityLoss):
    """Compute −mean k(x_i, T(x_i)): what a group of transformations does to an input shall make no difference.

    Needs no labels, but a second forward pass, of T(x). Where the model draws dropout, the two passes see different masks, and
    invariance to these is asked for too; under `SimilarityMixin`, T(x) is seen without dropout.

    Args:
        transform: T, on one sample (a tensor without batch dimension), as those of torchvision v2; or on the whole batch.
        per_sample: whether T is called for each sample, so that a random T is drawn anew for each, or once for the batch.

    Raises:
        ValueError: later, if T changes the shape of a sample or the inputs are not one tensor.

    Source: Charpiat et al., NeurIPS 2019, section 5.1 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> loss = InvarianceLoss(lambda x: x.flip(0))(GradientBatch(operator, torch.ones(4, 3)))
        >>> round(loss.item(), 5)
        -1.0
    """

    def __init__(self, transform: Callable[..., Any], per_sample: bool = True) -> None:
        super().__init__()
        if not callable(transform):
            raise expected("transform", "a function of a tensor", type(transform).__name__)
        self.transform = transform
        self.per_sample = per_sample

    def compute(self, batch: GradientBatch) -> Tensor:
        other = batch.with_inputs(transformed(batch.inputs, self.transform, self.per_sample))
        for some in (batch, other):
            some.all_gradients.hold_formed()
        both = batch.usable & other.usable
        if not bool(both.any()):
            return batch.zero()
        pairs = (some.gradients_of(both) for some in (batch, other))
        return functional.pair_similarity_loss(pair_similarity(*pairs))


class TangentLoss(AbstractSimilarityLoss):
    """Compute mean_i ‖∂_x ∇_θ f(x_i) · e(x_i)‖², averaged over direction operators e: invariance to small transformations.

    It is the limit of ‖∇_θ f(x) − ∇_θ f(x + ε e)‖² / ε². Gradients are not normalized. The paper advises against the operator
    of image translation, ∇_x of the image: image intensities are too irregular for it.

    Args:
        operators: several e, or one alone: inputs -> directions of the same shape, for example (T_ε(x) − x)/ε.

    Raises:
        ValueError: without an operator; later, if a direction does not have the shape of the inputs.

    Source: Charpiat et al., NeurIPS 2019, section 5.1 of the supplementary material.

    Example:
        >>> from lightning_netsim import JacobianOperator
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2, bias=False), directions=1, create_graph=True)
        >>> loss = TangentLoss(torch.ones_like)(GradientBatch(operator, torch.zeros(4, 3)))
        >>> round(loss.item(), 5)
        3.0
    """

    def __init__(self, operators: list[Callable[..., Any]]) -> None:
        super().__init__()
        # One alone is not in the signature: LightningCLI cannot write such a union into a configuration.
        self.operators = [operators] if callable(operators) else list(operators) if isinstance(operators, Iterable) else []
        if not self.operators or not all(callable(operator) for operator in self.operators):
            raise expected("operators", "a function of the inputs, or several", repr(operators))

    def compute(self, batch: GradientBatch) -> Tensor:
        terms = []
        for operator in self.operators:
            direction = operator(batch.inputs)
            squares = _squared_speed(batch.operator, batch.inputs, direction, batch.labels)
            kept, size = torch.isfinite(squares).nonzero().squeeze(1), len(squares)
            if 0 < len(kept) < size:  # 0 · NaN is NaN: a backward pass must not come near a sample that is not finite.
                labels = None if batch.labels is None else batch.labels[kept.to(batch.labels.device)]
                squares = _squared_speed(batch.operator, take(batch.inputs, kept, size), take(direction, kept, size), labels)
            terms.append(squares.mean() if len(kept) else batch.zero())
        return torch.stack(terms).mean()


def _squared_speed(operator: JacobianOperator, inputs: Any, direction: Any, labels: Tensor | None) -> Tensor:
    """Return ‖∂_x ∇_θ f(x_i) · e_i‖² of each sample, shape (B,), summed over the directions of the outputs."""
    tangent = operator.tangent(inputs, direction, labels)
    return tangent.gram().diagonal(dim1=1, dim2=2).sum(1)


def transformed(inputs: Any, transform: Callable[[Any], Any], per_sample: bool = True) -> Any:
    """Return T(x): of each sample of a tensor, or of the whole batch.

    Raises:
        ValueError: if there is more than one tensor to be taken sample by sample, or the result has another shape.
    """
    if per_sample:
        if not isinstance(inputs, Tensor):
            remedy = "Pass `per_sample=False` and a transform of the whole batch."
            raise expected("inputs", "one tensor, to be transformed sample by sample", type(inputs).__name__, remedy)
        samples = [transform(sample) for sample in inputs]
        for sample in samples:
            _check_alike(sample, inputs[0])
        return torch.stack(samples)
    moved = transform(inputs)
    if isinstance(inputs, Tensor):
        _check_alike(moved, inputs)
    elif batch_size(moved) != batch_size(inputs):
        raise expected("transform", f"a function that returns {batch_size(inputs)} samples", f"{batch_size(moved)}")
    return moved


def _check_alike(moved: Any, given: Tensor) -> None:
    if not isinstance(moved, Tensor) or moved.shape != given.shape:
        got = f"shape {tuple(moved.shape)}" if isinstance(moved, Tensor) else type(moved).__name__
        raise expected("transform", f"a function that returns shape {tuple(given.shape)}, as it was given", got)


def _mean_gradient(jacobian: PerSampleJacobian) -> Tensor:
    """Return the mean of the gradients as they are, of all directions one after the other."""
    identity = torch.eye(jacobian.num_directions).to(jacobian.outputs).expand(jacobian.num_samples, -1, -1)
    sums = jacobian.weighted_sum(identity)
    return torch.cat([value.flatten() for value in sums.values()]) / jacobian.num_samples
