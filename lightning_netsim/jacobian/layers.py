"""Known layers: from what a call of a layer saw to the per-sample gradients of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_netsim.jacobian.convolution import ConvolutionFactor, Geometry, form_gradients
from lightning_netsim.jacobian.embedding import EmbeddingFactor
from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, OuterFactor, product

#: Factors by the name of the parameter inside its module.
Factors = dict[str, AbstractFactor]


def linear(module: nn.Linear, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = u Wᵀ + b; u (B, *, q), δ (B, d, *, p)."""
    batch, directions = deltas.shape[:2]
    deltas = deltas.reshape(batch, directions, -1, deltas.shape[-1])
    factors: Factors = {"weight": OuterFactor(inputs.reshape(batch, -1, inputs.shape[-1]), deltas)}
    if module.bias is not None:
        factors["bias"] = DenseFactor(deltas.sum(2))
    return factors


def convolution(module: _ConvNd, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = W * pad(u) + b; u (B, C, *S), δ (B, d, O, *S')."""
    sides = _padding(module)
    zeros = sides[::2] if module.padding_mode == "zeros" and sides[::2] == sides[1::2] else [0] * (len(sides) // 2)
    if not any(zeros) and any(sides):
        inputs = F.pad(inputs, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    geometry = Geometry(module.kernel_size, module.stride, module.dilation, module.groups, tuple(reversed(zeros)))
    return {"weight": ConvolutionFactor(inputs, deltas, geometry), **_channel_bias(module, deltas)}


def transposed_convolution(module: _ConvTransposeNd, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = Wᵀ * u + b, the adjoint of a convolution of y: the roles of input and δ are exchanged."""
    batch, directions = deltas.shape[:2]
    geometry = Geometry(module.kernel_size, module.stride, module.dilation, module.groups, _tuple(module.padding))
    adjoint_deltas = inputs.unsqueeze(1).expand(-1, directions, *inputs.shape[1:]).flatten(0, 1).unsqueeze(1)
    gradients = form_gradients(deltas.flatten(0, 1), adjoint_deltas, geometry).view(batch, directions, *module.weight.shape)
    return {"weight": DenseFactor(gradients), **_channel_bias(module, deltas)}


def embedding(module: nn.Embedding, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = W[u]; u (B, *) integers, δ (B, d, *, p)."""
    batch, directions = deltas.shape[:2]
    index = inputs.reshape(batch, -1).long()
    deltas = deltas.reshape(batch, directions, -1, deltas.shape[-1])
    if module.padding_idx is not None:
        padding = index == module.padding_idx
        index, deltas = index.masked_fill(padding, -1), deltas.masked_fill(padding[:, None, :, None], 0.0)
    return {"weight": EmbeddingFactor(index, deltas, module.num_embeddings)}


def batch_norm(module: _BatchNorm | _InstanceNorm, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = γ (u − running mean) / √(running variance + eps) + β: from the layer's input, so that γ = 0 is no special case."""
    mean, variance = module.get_buffer("running_mean").to(inputs), module.get_buffer("running_var").to(inputs)
    batch, channels = inputs.shape[:2]
    if torch.is_grad_enabled() and (
        inputs.requires_grad or deltas.requires_grad
    ):  # What follows below cannot be differentiated.
        return _affine(module, F.batch_norm(inputs, mean, variance, eps=module.eps), deltas, channel_dim=1)
    # Each channel of each sample counts as a channel of one sample: its gradients come from one pass over memory.
    inputs, mean, variance = inputs.reshape(1, batch * channels, -1), mean.repeat(batch), variance.repeat(batch)
    scale, shift = [], []
    for column in deltas.unbind(1):
        column = column.reshape(inputs.shape)
        _, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
            column, inputs, None, mean, variance, None, None, False, module.eps, [False, True, True]
        )
        scale.append(by_scale.view(batch, channels))
        shift.append(by_shift.view(batch, channels))
    return {"weight": DenseFactor(torch.stack(scale, 1)), "bias": DenseFactor(torch.stack(shift, 1))}


def instance_norm(module: _InstanceNorm, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = γ û + β with û normalized over the positions of each channel, or by running statistics where they are tracked."""
    if module.track_running_stats:
        return batch_norm(module, inputs, deltas)
    return _affine(module, F.instance_norm(inputs, eps=module.eps), deltas, channel_dim=1)


def layer_norm(module: nn.LayerNorm, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = γ û + β with û normalized over the last dimensions."""
    return _affine(module, F.layer_norm(inputs, module.normalized_shape, eps=module.eps), deltas)


def rms_norm(module: nn.RMSNorm, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = γ u / √(mean u² + eps) over the last dimensions."""
    return _affine(module, F.rms_norm(inputs, module.normalized_shape, eps=module.eps), deltas)


def group_norm(module: nn.GroupNorm, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = γ û + β with û normalized over groups of channels."""
    return _affine(module, F.group_norm(inputs, module.num_groups, eps=module.eps), deltas, channel_dim=1)


def prelu(module: nn.PReLU, inputs: Tensor, deltas: Tensor) -> Factors:
    """y = max(u, 0) + a min(u, 0), with one a or one for each channel."""
    negative = inputs.clamp_max(0)
    if module.num_parameters == 1 and deltas.shape[1] == 1 and torch.is_grad_enabled() and deltas.requires_grad:
        # The derivative of a product of two vectors would be two outer products with one number, several times as slow.
        return {"weight": DenseFactor((deltas * negative.unsqueeze(1)).flatten(2).sum(2, keepdim=True))}
    if module.num_parameters == 1:
        return {"weight": DenseFactor(product(deltas.flatten(2), negative.flatten(1).unsqueeze(1)))}
    negative = deltas * negative.unsqueeze(1)
    return {"weight": DenseFactor(negative.flatten(3).sum(3) if negative.ndim > 3 else negative)}


def _affine(module: nn.Module, normalized: Tensor, deltas: Tensor, channel_dim: int | None = None) -> Factors:
    """Return the factors of γ and β; they act on the channels, or on the last dimensions where `channel_dim` is None."""
    weight = module.get_parameter("weight")
    if channel_dim is None:
        summed = list(range(2, deltas.ndim - weight.ndim))
    else:
        summed = [dim for dim in range(2, deltas.ndim) if dim != channel_dim + 1]
    total: Callable[[Tensor], Tensor] = (lambda x: x.sum(summed)) if summed else (lambda x: x)
    factors: Factors = {"weight": DenseFactor(total(deltas * normalized.unsqueeze(1)))}
    if getattr(module, "bias", None) is not None:
        factors["bias"] = DenseFactor(total(deltas))
    return factors


def _channel_bias(module: _ConvNd, deltas: Tensor) -> Factors:
    return {} if module.bias is None else {"bias": DenseFactor(deltas.flatten(3).sum(3))}


def _padding(module: _ConvNd) -> list[int]:
    """Return the padding of a convolution as `F.pad` takes it: last dimension first, both sides."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if module.padding != "same":
        return [pad for pad in reversed(_tuple(module.padding)) for _ in range(2)]
    sides: list[int] = []
    for size, dilation in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
        total = dilation * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides


def _tuple(value: str | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(entry) for entry in value)


#: The layers whose gradients are factored, each with the function that does it. A subclass counts if it runs this `forward`.
KNOWN_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Factors]] = {
    nn.Linear: linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_convolution),
    nn.Embedding: embedding,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.PReLU: prelu,
}
