"""Keep sums, norms and cosines in float32 or better, whatever the precision of the training step around them."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """Return `value` in float32 if it is float16 or bfloat16, else unchanged."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def unit_rows(values: Tensor) -> Tensor:
    """Return each row of a matrix divided by its length, differentiable; a zero row stays zero, with a finite gradient.

    Rows are divided by their largest number first: squares of very small and very large ones leave the range of float32.
    """
    largest = values.detach().abs().amax(1, keepdim=True)
    values = values / largest.where(largest > 0, 1.0)
    length: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / length.where(length > 0, 1.0)


def to_double(value: Tensor) -> Tensor:
    """Return `value` in float64, on the CPU where the device has no float64 (MPS)."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def full_precision(value: Tensor) -> torch.autocast:
    """Return a context in which autocast does not lower the precision of products on the device of `value`."""
    return torch.autocast(value.device.type, enabled=False)
