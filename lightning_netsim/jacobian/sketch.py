"""A sparse random projection of gradients: every coordinate goes to one bucket with one sign."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import check_positive_int, expected

# Lengths of Fourier transforms that are fast: multiples of 4 without a prime factor above 7.
_FAST_STEP, _FAST_PRIMES = 4, (2, 3, 5, 7)
# No more of a share than this is given up for such a length.
_GIVEN_UP = 0.1
# Of more blocks than this, convolutions cost too much.
_MOST_BLOCKS = 64
# Numbers that are folded at a time, so that they stay in the cache.
_FOLDED_AT_A_TIME = 2**20


class SketchProjection:
    """Project gradients of P parameters to at most `projection_dim` numbers whose inner products are unbiased.

    Each parameter tensor has its share of the width. One that fits into its share is kept exactly; another is multiplied by
    random signs and folded, so that every bucket receives equally many coordinates:

        s_b = Σ_{j ≡ b mod K_t} σ_j g_j,    E ⟨s, s'⟩ = ⟨g, g'⟩,    variance ≈ Σ_t 2 ‖g_t‖² ‖g'_t‖² / K_t at most

    where entries spread evenly over the buckets. That is least where shares K_t are proportional to the tensors' energies
    ‖g_t‖²; without `energy` they are proportional to the square roots of their sizes. Folded widths are odd, so that folds do
    not line up with the rows of a matrix.

    A matrix is cut into blocks of at most K_t/2 rows and K_t columns. In each, entry (a, b) has the sign σ_a τ_b and goes to
    bucket a·m + b, up to an offset, for an m that has no divisor in common with K_t. The sketch of δ ⊗ u is then a sum of
    circular convolutions of K_t numbers made of δ with K_t made of u, see `convolve`. Two entries of a block in one bucket
    differ in row and in column, and no other two in one bucket have the same signs between them, so that the variance is that
    of independent signs.

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
        shares = _shares(sizes, projection_dim, energy or {name: size**0.5 for name, size in sizes.items()})
        self.widths = {name: _width(shapes[name], share) for name, share in shares.items()}
        self._shapes = dict(shapes)
        self._signs: dict[str, Tensor] = {}

    @property
    def dim(self) -> int:
        """Return the width K that results: the exact coordinates and the buckets."""
        return sum(self.widths.values())

    @property
    def is_exact(self) -> bool:
        """Return whether every tensor is kept exactly, so that nothing is lost."""
        return not any(self.is_folded(name) for name in self._shapes)

    def is_folded(self, name: str) -> bool:
        """Return whether the gradients of parameter `name` are folded rather than kept exactly."""
        return self.widths[name] < self._shapes[name].numel()

    def blocks(self, name: str) -> tuple[int, int] | None:
        """Return into how many blocks of rows and of columns a matrix is cut; None for what is no matrix or too large a one."""
        shape, width = self._shapes[name], self.widths[name]
        if len(shape) != 2 or not self.is_folded(name) or not _is_fast(width):
            return None
        rows, columns = _fewest_parts(shape[0], width // 2), _fewest_parts(shape[1], width)
        return (rows, columns) if rows * columns <= _MOST_BLOCKS else None

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Project the gradients of parameter `name`, shape (B, d, n), to shape (B, d, K_t)."""
        if not self.is_folded(name):
            return gradients
        width, signs, blocks = self.widths[name], self._sign(name, gradients), self.blocks(name)
        at_a_time = max(1, _FOLDED_AT_A_TIME // (gradients[:1].numel() or 1))
        folded = []
        for some in torch.split(gradients, at_a_time):
            signed = some * signs
            if blocks is not None:
                signed = torch.unflatten(torch.unflatten(signed, 2, self._shapes[name]), 3, (blocks[1], -1)).transpose(2, 3)
                signed = F.pad(signed, (0, self._row_length(name) - signed.shape[4])).flatten(2)
            whole = signed.shape[2] // width * width
            total = torch.unflatten(signed[..., :whole], 2, (-1, width)).sum(2)
            total[..., : signed.shape[2] - whole] += signed[..., whole:]
            folded.append(total)
        return torch.cat(folded)

    def convolve(self, name: str, inputs: Tensor, deltas: Tensor) -> Tensor:
        """Project Σ_t δ_t ⊗ u_t to shape (B, d, K_t) without forming it, for a parameter that has `blocks`.

        Args:
            name: the parameter, of shape (p, q).
            inputs: u, shape (B, T, q).
            deltas: δ, shape (B, d, T, p).
        """
        width, (rows, columns) = self.widths[name], self._shapes[name]
        row_signs, column_signs = (signs.to(deltas) for signs in self._row_and_column_signs(name))
        row_blocks, column_blocks = len(column_signs), len(row_signs)
        spectrum = torch.zeros((), device=deltas.device)
        for position, row_block, column_block in product(range(inputs.shape[1]), range(row_blocks), range(column_blocks)):
            some_rows = slice(row_block * rows // row_blocks, (row_block + 1) * rows // row_blocks)
            some_columns = slice(column_block * columns // column_blocks, (column_block + 1) * columns // column_blocks)
            first = column_block * rows
            places = torch.arange(first + some_rows.start, first + some_rows.stop, device=deltas.device)
            placed = deltas.new_zeros(*deltas.shape[:2], width)
            placed[..., places * self._row_length(name) % width] = (
                deltas[:, :, position, some_rows] * row_signs[column_block, some_rows]
            )
            signed = inputs[:, position, some_columns] * column_signs[row_block, some_columns]
            spectrum = spectrum + torch.fft.rfft(signed, width).unsqueeze(1) * torch.fft.rfft(placed)
        folded: Tensor = torch.fft.irfft(spectrum, width)
        return folded

    def scatter(self, name: str, index: Tensor, rows: Tensor) -> Tensor:
        """Project gradients with few rows that are not zero, to shape (B, d, K_t).

        Args:
            name: the parameter, of shape (V, p).
            index: shape (B, T), which rows of the parameter; the same one may come several times.
            rows: shape (B, d, T, p), what stands there.
        """
        columns = torch.arange(rows.shape[3], device=index.device)
        entry = index[:, :, None] * len(columns) + columns
        signed = rows * self._sign(name, rows)[entry].unsqueeze(1) if self.is_folded(name) else rows
        blocks = self.blocks(name)
        if blocks is None:
            place = entry
        else:
            size = len(columns) // blocks[1]
            row = columns // size * self._shapes[name][0] + index[:, :, None]
            place = row * self._row_length(name) + columns % size
        places = (place % self.widths[name]).unsqueeze(1).expand_as(rows)
        return rows.new_zeros(*rows.shape[:2], self.widths[name]).scatter_add(2, places.flatten(2), signed.flatten(2))

    def _row_length(self, name: str) -> int:
        """Return m, by how much the coordinates of two rows of a block differ."""
        blocks = self.blocks(name)
        length = self._shapes[name][1] // (1 if blocks is None else blocks[1])
        while gcd(length, self.widths[name]) > 1:
            length += 1
        return length

    def _sign(self, name: str, like: Tensor) -> Tensor:
        """Return the sign of every entry of a parameter, shape (n,)."""
        if name not in self._signs:
            blocks, shape = self.blocks(name), self._shapes[name]
            if blocks is None:
                self._signs[name] = self._drawn(name, shape.numel())
            else:
                rows, columns = self._row_and_column_signs(name)
                of_rows = rows.mT.repeat_interleave(shape[1] // blocks[1], 1)
                self._signs[name] = (of_rows * columns.repeat_interleave(shape[0] // blocks[0], 0)).flatten()
        return self._signs[name].to(like)

    def _row_and_column_signs(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a sign for each row, by block of columns (S, p), and one for each column, by block of rows (R, q)."""
        row_blocks, column_blocks = self.blocks(name) or (1, 1)
        rows, columns = self._shapes[name]
        drawn = self._drawn(name, column_blocks * rows + row_blocks * columns)
        return drawn[: column_blocks * rows].view(-1, rows), drawn[column_blocks * rows :].view(-1, columns)

    def _drawn(self, name: str, size: int) -> Tensor:
        # One generator for each tensor: the signs do not depend on the order in which tensors are asked for.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (1 + list(self._shapes).index(name)))
        return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1


def _shares(sizes: Mapping[str, int], projection_dim: int, energy: Mapping[str, float]) -> dict[str, int]:
    """Share the width among the tensors in proportion to their energy; none receives more than its size."""
    if sum(sizes.values()) <= projection_dim:
        return dict(sizes)
    # No tensor is left without a bucket, however small its gradient was when it was measured.
    floor = 1e-6 * max(energy.values()) or 1.0
    weight = {name: max(energy.get(name, 0.0), floor) for name in sizes}
    shares: dict[str, int] = {}
    open_names = set(sizes)
    while True:
        scale = (projection_dim - sum(shares.values())) / sum(weight[name] for name in open_names)
        filled = {name: sizes[name] for name in open_names if sizes[name] <= scale * weight[name]}
        if not filled:
            break
        shares |= filled
        open_names -= set(filled)
    shares |= {name: max(1, int(scale * weight[name])) for name in open_names}
    return {name: shares[name] for name in sizes}


def _width(shape: torch.Size, share: int) -> int:
    """Return the width for a tensor: its size if that is its share, else a fast length for a matrix, else an odd one."""
    if share == shape.numel():
        return share
    lengths = range(share, int((1 - _GIVEN_UP) * share), -1) if len(shape) == 2 else ()
    return next((length for length in lengths if _is_fast(length)), max(1, share - 1 + share % 2))


def _is_fast(length: int) -> bool:
    """Return whether Fourier transforms of this length are fast."""
    if length % _FAST_STEP:
        return False
    for prime in _FAST_PRIMES:
        while length % prime == 0:
            length //= prime
    return length == 1


def _fewest_parts(size: int, most: int) -> int:
    """Return the least number of equal parts of at most `most` into which `size` can be cut."""
    return next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= most)
