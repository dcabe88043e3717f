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
