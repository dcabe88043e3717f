"""Derivatives as the inputs of a model move, by differentiating backward passes, which most operations allow three times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def forward_derivatives(values: list[Tensor], inputs: list[Tensor], motion: list[Tensor]) -> list[Tensor | None]:
    """Return how each value moves as the inputs move by `motion`; None where it does not. Differentiable."""
    dependent = [value for value in values if value.requires_grad]
    starts = [torch.zeros_like(value, requires_grad=True) for value in dependent]
    if not dependent:
        return [None] * len(values)
    pulled = torch.autograd.grad(dependent, inputs, starts, create_graph=True, allow_unused=True)
    reached = [
        (gradient * moving.to(gradient)).sum() for gradient, moving in zip(pulled, motion, strict=True) if gradient is not None
    ]
    if not any(term.requires_grad for term in reached):
        return [None] * len(values)
    found = iter(torch.autograd.grad(torch.stack(reached).sum(), starts, create_graph=True, allow_unused=True))
    return [next(found) if value.requires_grad else None for value in values]


class ComposedNormalizations(TorchFunctionMode):
    """Write out, inside the block, normalizations that torch does not differentiate three times.

    Its third derivatives of `layer_norm`, of weight normalization and of `instance_norm` are wrong or missing: the formulas for
    the second hold the statistics constant.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FORMS.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _affine(_standardized(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    shape = [1, -1, *(1 for _ in input.shape[2:])]
    if use_input_stats:
        normalized = _standardized(input, list(range(2, input.ndim)), eps)
    elif running_mean is None or running_var is None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    else:
        normalized = (input - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
    return _affine(normalized, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g * v.square().sum([axis for axis in range(v.ndim) if axis != dim], keepdim=True).rsqrt())


def _standardized(input: Tensor, dims: list[int], eps: float) -> Tensor:
    centered = input - input.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normalized if weight is None else normalized * weight
    return scaled if bias is None else scaled + bias


_FORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
