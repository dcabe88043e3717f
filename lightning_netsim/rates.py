"""What a device does in a second: measured once, for the expected time of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

# A rate is that of the fastest of so many goes: on a busy machine most are slowed down.
_REPEATS = 12
# Rows so long leave the cache, and a copy of some of them is new memory every time.
_COPIED_NUMBERS = 2**19


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        products: multiplications of a large matrix product.
        bytes: bytes of scattered rows that are copied.
    """

    products: float
    bytes: float


@lru_cache(maxsize=4)
def measure_rates(device: torch.device) -> Rates:
    """Measure what a device does in a second; it takes some tenths of one, once in a process."""
    left = torch.ones(512, 4096, device=device)
    rows = torch.ones(48, _COPIED_NUMBERS, device=device)
    index = torch.arange(0, 48, 3, device=device)
    products = _fastest(lambda: left @ left.mT, device)
    copied = _fastest(lambda: rows.index_select(0, index), device)
    return Rates(512 * 512 * 4096 / products, len(index) * _COPIED_NUMBERS * rows.element_size() / copied)


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-6)
