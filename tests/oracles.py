"""Slow, obvious float64 answers that every fast path is held to. No code is shared with the package."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _sample(inputs: Any, row: int) -> Any:
    """Return sample `row` of `inputs` as a batch of one, its floating tensors in float64."""
    if isinstance(inputs, Tensor):
        one = inputs.detach()[row : row + 1].clone()
        return one.double() if one.is_floating_point() else one
    if isinstance(inputs, Mapping):
        return {key: _sample(value, row) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_sample(value, row) for value in inputs)
    return inputs


def _batch_size(inputs: Any) -> int:
    """Return B, the length of the first tensor in `inputs`."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(value.shape[0] for value in values if isinstance(value, Tensor))


def _call(model: nn.Module, inputs: Any) -> Tensor:
    """Call `model`: a mapping as keywords, a tuple as positional arguments, a tensor alone."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def loop_jacobian(
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Return ∂f(x)/∂θ, shape (B, D, P), float64: a loop over samples and outputs, one backward pass for each.

    The model is copied to float64; its mode (train or eval) is kept. Each sample is run as a batch of one.

    Args:
        model: maps the inputs to a tensor of shape (B, D) or (B,) (further dimensions are flattened into D).
        inputs: a tensor, a tuple of positional arguments or a mapping of keywords, batch first.
        forward: `forward(model, inputs) -> (1, D)`, where calling the model is not enough.
        parameters: names of parameters; by default those that require a gradient. The columns follow the order of
            `model.named_parameters()` by default, else that of the names given. An unused parameter gives zeros.
    """
    double = copy.deepcopy(model).double()
    by_name = dict(double.named_parameters())
    names = [name for name, p in by_name.items() if p.requires_grad] if parameters is None else list(parameters)
    chosen = [by_name[name].requires_grad_(True) for name in names]
    rows = []
    for row in range(_batch_size(inputs)):
        with torch.inference_mode(False), torch.enable_grad():
            outputs = (forward or _call)(double, _sample(inputs, row)).reshape(-1)
            per_output = []
            for value in outputs:
                grads = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
                flat = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(chosen, grads, strict=True)]
                per_output.append(torch.cat(flat))
        rows.append(torch.stack(per_output))
    return torch.stack(rows).detach()


def dense_kernel(jacobian: Tensor) -> Tensor:
    """Return K(x_i, x_j) for all pairs, shape (N, N, D, D), from a Jacobian of shape (N, D, P)."""
    jacobian = jacobian.double()
    n, d, _ = jacobian.shape
    kernel = torch.zeros(n, n, d, d, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for a in range(d):
                for b in range(d):
                    kernel[i, j, a, b] = (jacobian[i, a] * jacobian[j, b]).sum()
    return kernel


def _dense_root(gram: Tensor, floor: float) -> tuple[Tensor, int]:
    """Return the pseudo-inverse square root of one (D, D) matrix and the number of eigenvalues above floor·λ_max."""
    root = torch.zeros_like(gram)
    rank = 0
    if not bool(torch.isfinite(gram).all()):
        return root, rank
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    largest = float(values.max())
    for value, vector in zip(values, vectors.T, strict=True):
        if largest > 0 and float(value) > floor * largest:
            root = root + torch.outer(vector, vector) / math.sqrt(float(value))
            rank += 1
    return root, rank


def dense_normalized_kernel(jacobian: Tensor, floor: float = 1e-12) -> Tensor:
    """Return K^C(x_i, x_j) = C_i^(-1/2) K(x_i, x_j) C_j^(-1/2) for all pairs, shape (N, N, D, D)."""
    kernel = dense_kernel(jacobian)
    roots = [_dense_root(kernel[i, i], floor)[0] for i in range(len(kernel))]
    rows = [torch.stack([roots[i] @ kernel[i, j] @ roots[j] for j in range(len(kernel))]) for i in range(len(kernel))]
    return torch.stack(rows)


def dense_ranks(jacobian: Tensor, floor: float = 1e-12) -> list[int]:
    """Return the rank of C(x_i) for each sample: the number of eigenvalues above floor·λ_max."""
    kernel = dense_kernel(jacobian)
    return [_dense_root(kernel[i, i], floor)[1] for i in range(len(kernel))]


def dense_similarity(jacobian: Tensor, floor: float = 1e-12) -> Tensor:
    """Return k(x_i, x_j) = tr(K^C) / √(r_i r_j) for all pairs, shape (N, N); NaN for a sample of rank 0."""
    normalized = dense_normalized_kernel(jacobian, floor)
    ranks = dense_ranks(jacobian, floor)
    n = len(ranks)
    similarity = torch.full((n, n), math.nan, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if ranks[i] > 0 and ranks[j] > 0:
                similarity[i, j] = normalized[i, j].diagonal().sum() / math.sqrt(ranks[i] * ranks[j])
    return similarity
