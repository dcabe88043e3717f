"""The kernel of infinitely wide random ReLU networks, of any depth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, check_same_size, check_tensor
from lightning_netsim.functional._once import forbid_second_derivative
from lightning_netsim.functional._precision import full_precision, unit_rows, upcast


def arc_cosine(cosine: Tensor, depth: int = 1) -> Tensor:
    """Compute the similarity that a wide random ReLU network gives to two inputs, from the cosine of their angle.

    Each layer maps the cosine c to (sin θ + (π − θ) cos θ)/π with θ = arccos c. Its slope, 1 − θ/π, is finite also at c = ±1,
    where differentiating the formula would not be.

    Args:
        cosine: any shape, within [−1, 1]; what rounding put outside is taken for the end.
        depth: number of ReLU layers, at least 1.

    Returns:
        The cosine of the representations, the same shape, in float32 or better: within [0, 1], 1 at c = 1, falling as the
        angle grows, and at each depth above the one before. Differentiable once.

    Raises:
        NetsimError: `cosine` is not a floating-point tensor, or `depth` is not a positive int.

    Source: Cho and Saul, Kernel methods for deep learning, NeurIPS 2009, degree 1; Amir and Weiss, CVPR 2021, supplement.

    Example:
        >>> arc_cosine(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.3183, 1.0000])
        >>> arc_cosine(torch.tensor([-1.0, 0.0, 1.0]), depth=2)
        tensor([0.3183, 0.4937, 1.0000])
    """
    check_positive_int("depth", depth)
    similarity: Tensor = _ArcCosine.apply(upcast(check_tensor("cosine", cosine)), depth)
    return similarity


def arc_cosine_kernel(x: Tensor, y: Tensor | None = None, depth: int = 1, normalize: bool = True) -> Tensor:
    """Compute the arc-cosine kernel of all pairs: `arc_cosine` of their cosine, or that times ‖x‖ ‖y‖.

    It is the limit, for ever wider layers, of the inner product of the outputs of a ReLU network with random weights (He
    initialization, no biases); normalized, of the outputs divided by their length.

    Args:
        x: shape (N, K).
        y: shape (M, K); None for x itself.
        depth: number of ReLU layers, at least 1.
        normalize: leave out the lengths.

    Returns:
        Shape (N, M), in float32 or better. A zero row has similarity 0 to all, itself included. Differentiable once.

    Raises:
        NetsimError: for tensors that are not floating-point matrices of one width, or a depth that is not a positive int.

    Source: Cho and Saul, NeurIPS 2009, degree 1.

    Example:
        >>> arc_cosine_kernel(torch.eye(2), depth=2)
        tensor([[1.0000, 0.4937],
                [0.4937, 1.0000]])
        >>> arc_cosine_kernel(2 * torch.eye(2), torch.eye(2), normalize=False)
        tensor([[2.0000, 0.6366],
                [0.6366, 2.0000]])
    """
    check_positive_int("depth", depth)
    x = upcast(check_tensor("x", x, 2, like="(N, K)"))
    y = x if y is None else upcast(check_tensor("y", y, 2, like="(M, K)"))
    check_same_size("y", y, "x", x, dim=1)
    present = x.detach().any(1).unsqueeze(1) & y.detach().any(1)
    with full_precision(x):
        similarity: Tensor = _ArcCosine.apply(unit_rows(x) @ unit_rows(y).mT, depth)
    if not normalize:
        similarity = similarity * torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(y, dim=1)
    return similarity.where(present, 0.0)


class _ArcCosine(torch.autograd.Function):
    """The recursion; the slope is found on the way, as the product of 1 − θ/π over the layers."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, depth: int) -> Tensor:
        given, slope = cosine, torch.ones_like(cosine) if ctx.needs_input_grad[0] else None
        for _ in range(depth):
            cosine = cosine.clamp(-1, 1)
            angle = torch.acos(cosine)
            if slope is not None:
                slope *= 1 - angle / math.pi
            # sin θ = √((1 − c)(1 + c)) keeps its digits near the ends, where 1 − c² does not.
            sine = ((1 - cosine) * (1 + cosine)).sqrt()
            cosine = (sine + (math.pi - angle) * cosine) / math.pi
        if slope is not None:
            ctx.save_for_backward(given, slope)
        return cosine

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        given, slope = ctx.saved_tensors
        return gradient * forbid_second_derivative(slope, given), None
