"""Let gradients that are found on the way say that they cannot be differentiated, where they would pass for constants."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def forbid_second_derivative(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """Return a gradient, in the backward pass of a function of `inputs`; differentiating it with respect to these raises.

    `torch.autograd.function.once_differentiable` does not see to it where what comes down is itself a constant, as for a loss.
    """
    if not torch.is_grad_enabled():  # Without `create_graph`, nobody can differentiate it.
        return gradient
    given: Tensor = _Once.apply(gradient, *inputs)
    return given


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError("This function can be differentiated once, and not twice.")
