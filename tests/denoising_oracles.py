"""Slow, obvious float64 answers for the averages over kernel neighbors, and networks that are stationary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Denoised:
    """What is known of Q queries over N reference samples; each row is of one query."""

    weights: Tensor
    smoothed_targets: Tensor
    smoothed_outputs: Tensor
    factor: Tensor
    consistency: Tensor
    residual: Tensor
    spread: Tensor | None = None
    clamped: Tensor | None = None


def _inverse(matrix: Tensor, floor: float) -> Tensor:
    """Return the pseudo-inverse, singular values below floor·σ_max counted as zero."""
    left, values, right = torch.linalg.svd(matrix)
    inverse = torch.zeros_like(matrix)
    for place, value in enumerate(values):
        if float(value) > floor * float(values[0]):
            inverse = inverse + torch.outer(right[place], left[:, place]) / value
    return inverse


def by_matrices(
    queries: Tensor, reference: Tensor, targets: Tensor, outputs: Tensor, own: Tensor, floor: float = 1e-12
) -> Denoised:
    """Average with a_ij = (Σ_j K_ij)⁺ K_ij, K_ij = G_iᵀ G_j, sample by sample.

    Args:
        queries: ∂f(x_i)/∂θ, shape (Q, D, P).
        reference: shape (N, D, P).
        targets: ỹ, shape (N, D).
        outputs: ŷ of the reference set, shape (N, D).
        own: ŷ of the queries, shape (Q, D).
        floor: singular values of Σ_j K_ij below this times the largest count as zero.
    """
    queries, reference, targets, outputs, own = (value.double() for value in (queries, reference, targets, outputs, own))
    number = queries.shape[1]
    all_weights, labels, means, factors, distances, residuals = [], [], [], [], [], []
    for i in range(len(queries)):
        kernels = [queries[i] @ reference[j].T for j in range(len(reference))]
        inverse = _inverse(sum(kernels, torch.zeros(number, number, dtype=torch.float64)), floor)
        weights = [inverse @ kernel for kernel in kernels]
        zero = torch.zeros(number, dtype=torch.float64)
        label = sum((a @ y for a, y in zip(weights, targets, strict=True)), zero)
        mean = sum((a @ y for a, y in zip(weights, outputs, strict=True)), zero)
        squares = sum(float(entry) ** 2 for a in weights for entry in a.flatten())
        all_weights.append(torch.stack(weights))
        labels.append(label)
        means.append(mean)
        factors.append(math.sqrt(squares / number))
        distances.append(math.sqrt(sum(float(entry) ** 2 for entry in own[i] - mean)))
        residuals.append(sum((kernels[j] @ (outputs[j] - targets[j]) for j in range(len(reference))), zero))
    return Denoised(
        torch.stack(all_weights),
        torch.stack(labels),
        torch.stack(means),
        torch.tensor(factors, dtype=torch.float64),
        torch.tensor(distances, dtype=torch.float64),
        torch.stack(residuals),
    )


def by_outputs(queries: Tensor, reference: Tensor, targets: Tensor, outputs: Tensor, own: Tensor) -> Denoised:
    """Average each output by itself, with max(0, ∇f_o(x_i)·∇f_o(x_j)) over its sum; the weights have the shape (Q, N, D)."""
    queries, reference, targets, outputs, own = (value.double() for value in (queries, reference, targets, outputs, own))
    shape = (len(queries), queries.shape[1])
    labels, means, spread, squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    residual, negative = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    weights = torch.zeros(shape[0], len(reference), shape[1], dtype=torch.float64)
    for i in range(shape[0]):
        for o in range(shape[1]):
            products = [float((queries[i, o] * gradient[o]).sum()) for gradient in reference]
            total = sum(max(k, 0.0) for k in products)
            for j, k in enumerate(products):
                weight = max(k, 0.0) / total
                cosine = k / (float(queries[i, o].norm()) * float(reference[j, o].norm()))
                weights[i, j, o] = weight
                labels[i, o] += weight * targets[j, o]
                means[i, o] += weight * outputs[j, o]
                squares[i, o] += weight**2
                spread[i, o] += weight * math.sqrt(max(1 - cosine, 0.0))
                negative[o] += (k < 0) / (shape[0] * len(reference))
                for b in range(shape[1]):  # As in the loss, of all outputs together.
                    residual[i, o] += (queries[i, o] * reference[j, b]).sum() * (outputs[j, b] - targets[j, b])
    distance = (own - means).square().sum(1).sqrt()
    return Denoised(weights, labels, means, squares.mean(1).sqrt(), distance, residual, spread, negative)


def paper_constant(weight: Tensor, activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the paper's ‖w‖ max ‖∇f‖ max √(Σ_i (1 + |a_i|)²) of each output, shape (D,).

    Args:
        weight: shape (D, h).
        activations: a(x), the input of the last layer, shape (N, h).
        gradients: ∂f(x)/∂θ, shape (N, D, P).
    """
    found = []
    for o in range(len(weight)):
        steepest = max(float(gradient[o].norm()) for gradient in gradients)
        widest = max(math.sqrt(sum((1 + abs(float(a))) ** 2 for a in row)) for row in activations)
        found.append(float(weight[o].norm()) * steepest * widest)
    return torch.tensor(found, dtype=torch.float64)


#: (outputs, labels) -> the loss, summed over samples; its gradient by the outputs is ŷ − ỹ.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda outputs, targets: (outputs - targets).square().sum() / 2,
    "softmax": lambda outputs, targets: -(targets * outputs.log_softmax(1)).sum(),
    "sigmoid": lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum"),
}
#: outputs -> ŷ.
FITTED: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": lambda outputs: outputs,
    "softmax": lambda outputs: outputs.softmax(1),
    "sigmoid": lambda outputs: outputs.sigmoid(),
}
#: Each loss with some numbers of outputs.
LOSS_OUTPUTS = [("squared", 1), ("squared", 2), ("squared", 3), ("softmax", 2), ("softmax", 3), ("sigmoid", 1)]


def inseparable_labels(loss: str, size: int, number: int) -> Tensor:
    """Return labels ỹ that repeat after seven samples, which inputs drawn at random do not: no model separates them.

    Args:
        loss: one of `LOSSES`.
        size: N.
        number: D.
    """
    if loss == "squared":
        return torch.randn(size, number, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    numbers = torch.arange(size) % 7 % max(2, number)
    return numbers.double().unsqueeze(1) if number == 1 else F.one_hot(numbers, number).double()


def train_to_the_bottom(model: nn.Module, inputs: Tensor, targets: Tensor, loss: str) -> None:
    """Bring a float64 model whose outputs are linear in its trainable parameters to the minimum of its loss."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sizes = [parameter.numel() for parameter in trained.values()]

    def total(flat: Tensor) -> Tensor:
        parts = zip(trained.items(), flat.split(sizes), strict=True)
        state = {name: part.reshape(parameter.shape) for (name, parameter), part in parts}
        return LOSSES[loss](torch.func.functional_call(model, state, (inputs,)), targets)

    point = torch.zeros(sum(sizes), dtype=torch.float64)
    for _ in range(10):  # Newton steps; directions without curvature, as a number added to all logits, are left alone.
        gradient, curvature = torch.func.grad(total)(point), torch.autograd.functional.hessian(total, point)
        point = point - torch.linalg.pinv(curvature, rtol=1e-10) @ gradient
    with torch.no_grad():
        for parameter, part in zip(trained.values(), point.split(sizes), strict=True):
            parameter.copy_(part.reshape(parameter.shape))


def labels_at_the_bottom(jacobian: Tensor, fitted: Tensor, seed: int = 0) -> Tensor:
    """Return random labels ỹ for which a network with these gradients and ŷ is where Σ_j G_j (ŷ_j − ỹ_j) = 0.

    Each row of ŷ − ỹ sums to zero where there are several outputs, as it has to where both are distributions.

    Args:
        jacobian: shape (N, D, P), with more numbers ND than there are parameters.
        fitted: shape (N, D), ŷ.
        seed: seed of the labels.
    """
    size, number, _ = jacobian.shape
    conditions = [jacobian.flatten(0, 1).T]
    if number > 1:
        conditions.append(torch.eye(size, dtype=torch.float64).repeat_interleave(number, dim=1))
    matrix = torch.cat(conditions)
    noise = torch.randn(size * number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return fitted + (noise - torch.linalg.pinv(matrix, rtol=1e-12) @ (matrix @ noise)).reshape(size, number)
