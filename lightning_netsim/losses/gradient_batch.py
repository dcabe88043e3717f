"""What a similarity criterion is computed from: a batch, and the differentiable gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.features import Normalization
from lightning_netsim.functional.similarity import group_members
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian
from lightning_netsim.losses.kernel_sums import kernel_sums


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
        self.given_labels = labels
        self._compute = compute or (lambda: operator(inputs, labels))

    def with_inputs(self, inputs: Any) -> GradientBatch:
        """Return a batch of other inputs with the same labels, under the same operator."""
        return GradientBatch(self.operator, inputs, self.given_labels)

    @cached_property
    def all_gradients(self) -> PerSampleJacobian:
        """The per-sample Jacobian of all samples, left out or not."""
        return self._compute()

    @property
    def outputs(self) -> Tensor:
        """The outputs of the model, shape (B, D)."""
        return self.all_gradients.outputs

    @cached_property
    def usable(self) -> Tensor:
        """Which samples have a gradient that can be normalized, shape (B,), bool."""
        return Normalization.of(self.all_gradients.detached()).rank > 0

    @cached_property
    def jacobian(self) -> PerSampleJacobian:
        """The per-sample Jacobian of the usable samples."""
        return self.all_gradients if bool(self.usable.all()) else self.all_gradients.select(self.usable)

    @cached_property
    def labels(self) -> Tensor:
        """The labels of the usable samples.

        Raises:
            ValueError: if there are none, or not one whole number for each sample.
        """
        labels, size = self.given_labels, len(self.usable)
        if labels is None or labels.shape != (size,) or labels.is_floating_point():
            got = "none" if labels is None else f"shape {tuple(labels.shape)} of {labels.dtype}"
            remedy = "Give the batch as (inputs, labels), or choose a criterion without labels."
            raise expected("labels", f"the group of each sample, whole numbers of shape ({size},)", got, remedy)
        labels = labels.to(self.usable.device)
        return labels[self.usable]

    def groups(self) -> Tensor:
        """Return which usable samples belong to each group of two or more, shape (B', number of such groups)."""
        return group_members(self.labels).to(self.outputs.dtype)

    def similarity(self) -> Tensor:
        """Return k of all pairs of usable samples, shape (B', B'): exact, differentiable, in memory for all pairs."""
        return kernel_sums(self.jacobian, torch.eye(self.jacobian.num_samples).to(self.outputs))

    def zero(self) -> Tensor:
        """Return 0 on the graph: what a criterion is where nothing can be compared, so that backward passes still run."""
        return self.outputs.nan_to_num(0, 0, 0).sum() * 0
