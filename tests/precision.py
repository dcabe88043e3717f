"""How far a computed number may be from the exact one: tolerances follow from the precision and from the size of the sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Errors of one rounding, in units of the machine epsilon, that the order of summation and the processor may add up to.
_ROUNDINGS = 8


def rounding(dtype: torch.dtype, size: float = 1.0, terms: int = 1) -> float:
    """Return 8 ε √terms · size: what a sum of `terms` numbers, about `size` in all, may be off by in `dtype`."""
    return _ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(max(1, terms)) * size


def assert_near(actual: Tensor, wanted: Tensor, terms: int = 1, dtype: torch.dtype | None = None) -> None:
    """Assert that `actual` is `wanted` up to rounding in `dtype`, by default its own; sizes are those of the largest entry.

    Args:
        actual: what was computed.
        wanted: the oracle's, of the same shape, in any precision.
        terms: how many numbers were added up for one entry.
        dtype: the precision of the computation, where the result was brought to another one.
    """
    finite = wanted.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    size = max(1.0, float(finite.max())) if wanted.numel() else 1.0
    allowed = rounding(dtype or actual.dtype, size, terms)
    torch.testing.assert_close(actual.double().cpu(), wanted.double().cpu(), rtol=0, atol=allowed, equal_nan=True)
