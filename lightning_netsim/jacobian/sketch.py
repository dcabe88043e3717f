"""A sparse random projection of gradients: every coordinate goes to one bucket with one sign."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, expected


class SketchProjection:
    """Project gradients of P parameters to at most `projection_dim` numbers whose inner products are unbiased.

    Each parameter tensor has its share of the width. One that fits into its share is kept exactly; another is multiplied by
    random signs and folded, so that every bucket receives equally many coordinates:

        s_b = Σ_{j ≡ b mod K_t} σ_j g_j,    E ⟨s, s'⟩ = ⟨g, g'⟩,    variance ≈ Σ_t 2 ‖g_t‖² ‖g'_t‖² / K_t at most

    where entries spread evenly over the buckets. That is least where shares K_t are proportional to the tensors' energies
    ‖g_t‖²; without `energy` they are proportional to the square roots of their sizes. Folded widths are odd, so that folds do
    not line up with the rows of a matrix.

    Args:
        shapes: the shape of every parameter, by name.
        projection_dim: the width K to aim at, at least the number of tensors.
        seed: seed of the signs.
        energy: the mean squared norm of the gradient in each tensor, by name.

    Raises:
        ValueError: if `projection_dim` is not a positive int or leaves a tensor without a bucket.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], projection_dim: int, seed: int = 0, energy: Mapping[str, float] | None = None
    ) -> None:
        check_positive_int("projection_dim", projection_dim)
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        if projection_dim < len(sizes):
            raise expected(
                "projection_dim",
                f"at least {len(sizes)} for each direction, one for each parameter tensor",
                str(projection_dim),
            )
        self.projection_dim = projection_dim
        self.seed = seed
        self.widths = _widths(sizes, projection_dim, energy or {name: size**0.5 for name, size in sizes.items()})
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
        signed = gradients * self._sign(name, size).to(gradients)
        whole = size // width * width
        folded = signed[..., :whole].view(*gradients.shape[:-1], size // width, width).sum(-2)
        folded[..., : size - whole] += signed[..., whole:]
        return folded

    def _sign(self, name: str, size: int) -> Tensor:
        if name not in self._signs:
            # One generator for each tensor: the signs do not depend on the order in which tensors are asked for.
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (1 + list(self._shapes).index(name)))
            self._signs[name] = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        return self._signs[name]


def _widths(sizes: Mapping[str, int], projection_dim: int, energy: Mapping[str, float]) -> dict[str, int]:
    """Share the width among the tensors in proportion to their energy; none receives more than its size."""
    if sum(sizes.values()) <= projection_dim:
        return dict(sizes)
    # No tensor is left without a bucket, however small its gradient was when it was measured.
    floor = 1e-6 * max(energy.values()) or 1.0
    weight = {name: max(energy.get(name, 0.0), floor) for name in sizes}
    widths: dict[str, int] = {}
    open_names = set(sizes)
    while True:
        scale = (projection_dim - sum(widths.values())) / sum(weight[name] for name in open_names)
        filled = {name: sizes[name] for name in open_names if sizes[name] <= scale * weight[name]}
        if not filled:
            break
        widths |= filled
        open_names -= set(filled)
    for name in open_names:
        share = int(scale * weight[name])
        widths[name] = max(1, share - 1 + share % 2)
    return {name: widths[name] for name in sizes}
