"""Dual numbers: tensors that carry a derivative along with their value, for forward-mode differentiation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from lightning_netsim._checks import expected
from lightning_netsim.jacobian import trees


def value_and_tangent(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value of a tensor and its tangent; None where it has none. Inside a dual level only."""
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent


def with_tangents(tree: Any, direction: Any) -> Any:
    """Return `tree` with every floating-point tensor as a dual number whose tangent is the tensor of `direction` there.

    To be called inside `torch.autograd.forward_ad.dual_level`.

    Raises:
        ValueError: if `direction` does not hold one tensor of the same shape for each.
    """
    floating = [leaf for leaf in trees.tensors(tree) if leaf.is_floating_point()]
    tangents = [leaf for leaf in trees.tensors(direction) if leaf.is_floating_point()]
    wanted, got = [tuple(leaf.shape) for leaf in floating], [tuple(leaf.shape) for leaf in tangents]
    if wanted != got:
        raise expected("direction", f"floating-point tensors of the shapes {wanted}, as the inputs", f"shapes {got}")
    remaining = iter(tangents)

    def dual(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            moving: Tensor = forward_ad.make_dual(leaf.detach(), next(remaining).detach().to(leaf))  # type: ignore[no-untyped-call]
            return moving
        return leaf

    return trees.map_leaves(dual, tree)
