"""Keep sums, norms and cosines in float32 or better, whatever the precision of the training step around them."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """Return `value` in float32 if it is float16 or bfloat16, else unchanged."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def to_double(value: Tensor) -> Tensor:
    """Return `value` in float64, on the CPU where the device has no float64 (MPS)."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def full_precision(value: Tensor) -> torch.autocast:
    """Return a context in which autocast does not lower the precision of products on the device of `value`."""
    return torch.autocast(value.device.type, enabled=False)
