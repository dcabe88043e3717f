"""Normalizations written out, so that they can be differentiated three times.

The third derivatives that torch has of `layer_norm`, of weight normalization and of `instance_norm` are wrong or missing: its
formulas for the second hold the statistics constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ComposedNormalizations(TorchFunctionMode):
    """Replace these functions by elementary operations inside the block."""

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
