"""What a similarity criterion is computed from: a batch, and the differentiable gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.data.trees import take
from lightning_netsim.functional.similarity import group_members
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian
from lightning_netsim.losses.kernel_sums import UnitGradients, kernel_sums


class GradientBatch:
    """A batch, and its per-sample Jacobian, which is computed when it is first asked for and can be differentiated.

    Samples with a zero or non-finite gradient are left out of `jacobian` and of what goes with it.

    Args:
        operator: made with ``create_graph=True``.
        inputs: the batch, as the model takes it.
        labels: shape (B,), the group of each sample; None where there are none.
        compute: what gives the per-sample Jacobian where it is not a call of the operator, for example from a forward pass
            that was recorded.

    Raises:
        ValueError: if the operator keeps no graph.

    Example:
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2), create_graph=True)
        >>> batch = GradientBatch(operator, torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
        >>> batch.jacobian.num_samples, batch.similarity().shape
        (4, torch.Size([4, 4]))
    """

    def __init__(
        self,
        operator: JacobianOperator,
        inputs: Any,
        labels: Tensor | None = None,
        compute: Callable[[], PerSampleJacobian] | None = None,
    ) -> None:
        if not operator.create_graph:
            raise expected("operator", "one whose gradients can be differentiated", "none", "Make it with `create_graph=True`.")
        self.operator = operator
        self.inputs = inputs
        self.labels = labels
        self._compute = compute or (lambda: operator(inputs, labels))

    def with_inputs(self, inputs: Any) -> GradientBatch:
        """Return a batch of other inputs with the same labels, under the same operator."""
        return GradientBatch(self.operator, inputs, self.labels)

    @cached_property
    def all_gradients(self) -> PerSampleJacobian:
        """The per-sample Jacobian of all samples, left out or not."""
        return self._compute()

    @property
    def outputs(self) -> Tensor:
        """The outputs of the model, shape (B, D)."""
        return self.all_gradients.outputs

    @cached_property
    def _all_units(self) -> UnitGradients:
        return UnitGradients(self.all_gradients)

    @property
    def usable(self) -> Tensor:
        """Which samples have a gradient that can be normalized, shape (B,), bool."""
        return self._all_units.usable

    @cached_property
    def unit(self) -> UnitGradients:
        """The unit gradients of the usable samples, off the graph."""
        return self._all_units if bool(self.usable.all()) else UnitGradients(self.jacobian)

    @cached_property
    def jacobian(self) -> PerSampleJacobian:
        """The per-sample Jacobian of the usable samples."""
        return self.gradients_of(self.usable)

    def gradients_of(self, kept: Tensor) -> PerSampleJacobian:
        """Return the per-sample Jacobian of some samples, `kept` of shape (B,), bool."""
        if bool(kept.all()):
            return self.all_gradients
        if bool(self.all_gradients.finite().all()):
            return self.all_gradients.select(kept)
        # 0 · NaN is NaN: a backward pass must not come near a sample that is not finite.
        labels = None if self.labels is None else self.labels.to(kept.device)[kept]
        return self.operator(take(self.inputs, kept.nonzero().squeeze(1), len(kept)), labels)

    def groups(self, kept: Tensor) -> Tensor:
        """Return which of some samples belong to each label with two of them or more, shape (B', number of such labels).

        Args:
            kept: which samples count, shape (B,), bool.

        Raises:
            ValueError: if there are no labels, or not one whole number for each sample.
        """
        labels, size = self.labels, len(kept)
        if not isinstance(labels, Tensor) or labels.shape != (size,) or labels.is_floating_point():
            kind = "none" if labels is None else type(labels).__name__
            got = f"shape {tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else kind
            remedy = "Give the batch as (inputs, labels), or choose a criterion without labels."
            raise expected("labels", f"the group of each sample, whole numbers of shape ({size},)", got, remedy)
        return group_members(labels.to(kept.device)[kept]).to(self.outputs.dtype)

    def similarity(self) -> Tensor:
        """Return k of all pairs of usable samples, shape (B', B'): exact, differentiable, in memory for all pairs."""
        return kernel_sums(self.jacobian, torch.eye(self.jacobian.num_samples).to(self.outputs), self.unit)

    def zero(self) -> Tensor:
        """Return 0 on the graph: what a criterion is where nothing can be compared, so that backward passes still run."""
        return torch.stack([parameter.sum() for parameter in self.operator.ownership.parameters.values()]).sum() * 0
