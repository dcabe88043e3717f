"""What all tests of Jacobians need: the cases in float64, their oracles, and a comparison in units of the largest entry."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim.data.trees import map_leaves
from lightning_netsim.jacobian import PerSampleJacobian, per_sample_jacobian
from tests import cases, oracles

#: Cases that are quick in float64.
SMALL = [name for name in cases.CASES if name not in cases.LARGE]


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that `actual` is `wanted` up to a share of its largest entry; NaN where it is NaN."""
    largest = float(wanted.detach().abs().nan_to_num().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=tolerance * max(largest, 1e-12), equal_nan=True)


def in_precision(tree: Any, dtype: torch.dtype) -> Any:
    """Return `tree` with its floating-point tensors in `dtype`."""
    return map_leaves(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree)


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """Return the model and the batch of a case in `dtype`."""
    model, inputs = cases.build(name)
    return model.to(dtype), in_precision(inputs, dtype)


def jacobian(name: str, dtype: torch.dtype = torch.float64) -> PerSampleJacobian:
    """Return the per-sample Jacobian of a case."""
    return per_sample_jacobian(*build(name, dtype))


@cache
def oracle(name: str) -> Tensor:
    """Return the same by a loop in float64, shape (B, D, P)."""
    return oracles.loop_jacobian(*cases.build(name))


def split(direction: Tensor, result: PerSampleJacobian) -> dict[str, Tensor]:
    """Cut a (c, P) matrix into one tensor for each parameter."""
    parts = direction.split([shape.numel() for shape in result.shapes.values()], 1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(result.shapes.items(), parts, strict=True)}


def check_methods(result: PerSampleJacobian, wanted: Tensor, tolerance: float) -> None:
    """Hold every method of a Jacobian to the dense one, shape (B, D, P)."""
    dtype = result.outputs.dtype
    weight = torch.randn(*wanted.shape[:2], 3, dtype=torch.float64)
    direction = torch.randn(3, wanted.shape[2], dtype=torch.float64)
    named, mixing = split(direction.to(dtype), result), weight.to(dtype)
    close(result.gram(), wanted @ wanted.mT, tolerance)
    close(result.inner(result), torch.einsum("iap,jbp->ijab", wanted, wanted), tolerance)
    close(result.dot(named), wanted @ direction.mT, tolerance)
    total = result.weighted_sum(mixing)
    zeros = {name: torch.zeros(3, shape.numel()) for name, shape in result.shapes.items()}
    found = torch.cat([total.get(name, zeros[name]).reshape(3, -1) for name in result.shapes], 1)
    close(found, torch.einsum("bdp,bdc->cp", wanted, weight), tolerance)
    close(result.materialize(), wanted, tolerance)
    mixed, wanted_mixed = result.mix(mixing), torch.einsum("bdp,bdc->bcp", wanted, weight)
    close(mixed.materialize(), wanted_mixed, tolerance)
    close(mixed.trace_inner(mixed), torch.einsum("iap,jap->ij", wanted_mixed, wanted_mixed), tolerance)
    close(mixed.trace_dot(named), torch.einsum("bcp,cp->b", wanted_mixed, direction), tolerance)
