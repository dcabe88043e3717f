"""A sparse random projection of gradients: every coordinate goes to one bucket with one sign."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import check_positive_int, expected


class SketchProjection:
    """Project gradients of P parameters to about `projection_dim` numbers whose inner products are unbiased.

    Small parameter tensors are kept exactly, up to half of the width; each larger one is multiplied by random signs and folded
    into its share of the rest, so that every bucket receives equally many coordinates:

        s_b = Σ_{j ≡ b mod K_t} σ_j g_j,    E ⟨s, s'⟩ = ⟨g, g'⟩

    Shares grow with the square root of the tensors' sizes, and are odd, so that the folds do not line up with the rows of a
    matrix.

    Args:
        shapes: the shape of every parameter, by name.
        projection_dim: the width K to aim at, at least 2 × the number of large tensors.
        seed: seed of the signs.

    Raises:
        ValueError: if `projection_dim` is not a positive int or leaves a tensor without a bucket.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], projection_dim: int, seed: int = 0) -> None:
        check_positive_int("projection_dim", projection_dim)
        self.projection_dim = projection_dim
        self.seed = seed
        self.widths = _widths({name: shape.numel() for name, shape in shapes.items()}, projection_dim)
        self._shapes = dict(shapes)
        self._signs: dict[str, Tensor] = {}

    @property
    def dim(self) -> int:
        """Return the width K that results: the exact coordinates and the buckets."""
        return sum(self.widths.values())

    @property
    def is_exact(self) -> bool:
        """Return whether every tensor is kept exactly, so that nothing is lost."""
        return all(self.widths[name] == shape.numel() for name, shape in self._shapes.items())

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Project the gradients of parameter `name`, shape (B, d, n), to shape (B, d, width)."""
        width, size = self.widths[name], gradients.shape[-1]
        if width == size:
            return gradients
        folds = -(-size // width)
        signed = gradients * self._sign(name, size).to(gradients)
        return torch.unflatten(F.pad(signed, (0, folds * width - size)), -1, (folds, width)).sum(-2)

    def _sign(self, name: str, size: int) -> Tensor:
        if name not in self._signs:
            # One generator for each tensor: the signs do not depend on the order in which tensors are asked for.
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (1 + list(self._shapes).index(name)))
            self._signs[name] = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        return self._signs[name]


def _widths(sizes: Mapping[str, int], projection_dim: int) -> dict[str, int]:
    if sum(sizes.values()) <= projection_dim:
        return dict(sizes)
    widths: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        if sum(widths.values()) + size <= projection_dim // 2:
            widths[name] = size
    large = {name: size for name, size in sizes.items() if name not in widths}
    # One bucket for each, whatever its size, and the others by size.
    rest = projection_dim - sum(widths.values()) - len(large)
    if rest < 0:
        raise expected("projection_dim", f"at least {2 * len(large)} for each direction of this model", str(projection_dim))
    total = sum(size**0.5 for size in large.values())
    for name, size in large.items():
        share = 1 + int(rest * size**0.5 / total)
        widths[name] = min(size, share - 1 + share % 2)
    return {name: widths[name] for name in sizes}
