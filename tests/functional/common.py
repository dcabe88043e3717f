"""What the tests of this room and of the losses share: random numbers, and the comparison of values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def random(seed: int, *shape: int) -> Tensor:
    """Return normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, wanted: Tensor, *leaves: Tensor, tolerance: float = 1e-10, exact: Tensor | None = None) -> None:
    """Hold a value to the oracle's, and its gradient by each of `leaves`, relative to their size.

    Args:
        found: what was computed.
        wanted: the oracle's.
        leaves: what both were computed from.
        tolerance: relative.
        exact: what the oracle was computed from, where that is not the one leaf.
    """
    torch.testing.assert_close(found.detach().double(), wanted.detach().double(), rtol=tolerance, atol=1e-14)
    for leaf in leaves:
        sources = ((found, leaf), (wanted, leaf if exact is None else exact))
        mine, other = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0].double() for v, x in sources)
        assert float((mine - other).norm()) <= max(tolerance * float(other.norm()), 1e-14)
