"""How many neighbors as near as a given one are to be expected by chance: few for a copy, whatever the network.

No multiple of a typical distance tells copies from neighbors: the distances of nearest neighbors spread widely under a network
that sees few dimensions, and hardly at all under one that sees many. How many it sees is read off the distances themselves
(experiments/duplicates.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_netsim._checks import check_tensor, expected
from lightning_netsim.functional._precision import to_double


def neighbor_dimension(distance: Tensor) -> float:
    """Estimate the dimension of a set of samples from the distances of their neighbors: ln(k / h) / median ln(d_k / d_h).

    Within a ball the number of samples grows as its radius to the power of the dimension: k of them lie within d_k, h = ⌊k/2⌋
    within d_h.

    Args:
        distance: shape (N, k), k ≥ 2, ascending, of the k nearest neighbors of each sample; NaN where there is none.

    Returns:
        the dimension; infinite where all distances are the same, NaN where none is known.

    Raises:
        NetsimError: `distance` has another shape.

    Example:
        >>> round(neighbor_dimension(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), 2)
        1.0
    """
    distance = to_double(_check(distance))
    k = distance.shape[1]
    near, far = distance[:, k // 2 - 1], distance[:, -1]
    growth = (far / near)[(near > 0) & torch.isfinite(far)].log()
    if not len(growth):
        return math.nan
    median = float(growth.median())
    return math.log(k / (k // 2)) / median if median > 0 else math.inf


def neighbor_radius(distance: Tensor) -> Tensor:
    """Return the distance of the last neighbor of each sample, shape (N,), at least a tenth of its median: copies have none.

    Args:
        distance: shape (N, k), as for `neighbor_dimension`.

    Raises:
        NetsimError: `distance` has another shape.
    """
    last = to_double(_check(distance))[:, -1]
    return last.clamp_min(float(last.nanmedian()) / 10)


def expected_neighbors(distance: Tensor, radius: Tensor, k: int, dimension: float) -> Tensor:
    """Compute how many neighbors as near as `distance` are to be expected where k lie within `radius`: k (d / R)^D.

    Args:
        distance: any shape, d.
        radius: the same shape, R: of one sample from `neighbor_radius`, of a pair the geometric mean of both.
        k: how many neighbors lie within.
        dimension: D, from `neighbor_dimension`.

    Returns:
        The shape of `distance`, at least 0, and 0 for a distance of 0. The chance of at least one so near is 1 − exp(−value).

    Example:
        >>> expected_neighbors(torch.tensor([0.5]), torch.tensor([1.0]), k=8, dimension=3.0).item()
        1.0
    """
    share = to_double(distance) / to_double(radius)
    return torch.where(distance == 0, 0.0, k * share**dimension)


def _check(distance: Tensor) -> Tensor:
    check_tensor("distance", distance, 2, like="(N, k)")
    if distance.shape[1] < 2:
        raise expected("distance", "of shape (N, k) with k of at least 2", f"shape {tuple(distance.shape)}")
    return distance
