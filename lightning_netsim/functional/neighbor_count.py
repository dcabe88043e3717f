"""Count the neighbors of samples under the kernel: soft, hard and power counts.

Source: Charpiat et al., NeurIPS 2019, section 4 (density estimation). Features are unit vectors φ(x), one row for each
sample, so that k(x, x') = φ(x) · φ(x'). A row that is zero or not finite stands for a sample that was left out: as a query it
counts NaN, as a reference sample it is not counted. No (Q, N) matrix is held.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_netsim._checks import check_numbers, check_positive_int, check_positive_number
from lightning_netsim.functional._blocks import check_features, usable_rows
from lightning_netsim.functional._precision import full_precision, to_double, upcast
from lightning_netsim.functional.results import NeighborCountResult

# k(x, x) = 1 only up to rounding: a threshold is lowered by this many eps, so that duplicates reach a threshold of 1.
_TOLERANCE_EPS = 16


def soft_count(query: Tensor, reference: Tensor | None = None, chunk_size: int = 1024) -> Tensor:
    """Compute the soft count N_S(x_i) = Σ_j k(x_i, x_j) = φ(x_i) · Σ_j φ(x_j), in time linear in Q + N.

    A sample counts itself if it is in the reference set. Differentiable.

    Args:
        query: shape (Q, K), features, in any floating precision; sums are taken in float64.
        reference: shape (N, K); by default the query set itself.
        chunk_size: rows that are held in float64 at once, at least 1.

    Returns:
        Shape (Q,), in [-N, N]; NaN for a query that was left out.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 4.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> soft_count(features).tolist()
        [2.0, 2.0, 1.0]
    """
    reference = check_features(query, reference)
    check_positive_int("chunk_size", chunk_size)
    with full_precision(query):
        total = to_double(query.new_zeros(query.shape[1]))
        for block in torch.split(reference, chunk_size):
            total = total + torch.where(usable_rows(block).unsqueeze(1), to_double(block), 0.0).sum(dim=0).to(total.device)
        counts = [
            torch.where(usable_rows(block), (to_double(block) @ total).to(block.device), torch.nan)
            for block in torch.split(query, chunk_size)
        ]
    return torch.cat(counts).to(upcast(query))


def hard_count(query: Tensor, reference: Tensor | None = None, threshold: float = 0.9, chunk_size: int = 1024) -> Tensor:
    """Compute the hard count N_τ(x_i) = #{j : k(x_i, x_j) ≥ τ}.

    The threshold is lowered by 16 eps of the precision in which k is computed (1.9e-6 in float32), so that duplicates reach
    a threshold of 1.

    Args:
        query: shape (Q, K), features.
        reference: shape (N, K); by default the query set itself.
        threshold: τ, in [-1, 1].
        chunk_size: rows of a block of similarities, at least 1; memory grows with its square.

    Returns:
        Shape (Q,), floating-point whole numbers in [0, N]; NaN for a query that was left out.

    Raises:
        NetsimError: the shapes do not fit, or the threshold lies outside [-1, 1].

    Source: Charpiat et al., NeurIPS 2019, section 4.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> hard_count(features, threshold=0.7).tolist()
        [2.0, 2.0, 1.0]
    """
    hard, _ = _blockwise_counts(query, reference, check_numbers("threshold", (threshold,), -1, 1), (), chunk_size)
    return hard[float(threshold)]


def power_count(query: Tensor, reference: Tensor | None = None, power: float = 2.0, chunk_size: int = 1024) -> Tensor:
    """Compute the power count N_α(x_i) = Σ_j max(k(x_i, x_j), 0)^α, the "less soft" count.

    Args:
        query: shape (Q, K), features.
        reference: shape (N, K); by default the query set itself.
        power: α, above 0.
        chunk_size: rows of a block of similarities, at least 1; memory grows with its square.

    Returns:
        Shape (Q,), in [0, N]; NaN for a query that was left out.

    Raises:
        NetsimError: the shapes do not fit, or the power is not a positive number.

    Source: Charpiat et al., NeurIPS 2019, section 4.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> [round(count, 4) for count in power_count(features, power=2).tolist()]
        [1.36, 1.36]
    """
    _, powers = _blockwise_counts(query, reference, (), (check_positive_number("power", power),), chunk_size)
    return powers[float(power)]


def neighbor_count(
    query: Tensor,
    reference: Tensor | None = None,
    thresholds: Iterable[float] = (),
    powers: Iterable[float] = (),
    chunk_size: int = 1024,
) -> NeighborCountResult:
    """Compute the soft count, and the hard and power counts that are asked for, in one pass over blocks.

    Args:
        query: shape (Q, K), features φ(x), unit rows; sketched features are nearly so.
        reference: shape (N, K); by default the query set itself (a sample then counts itself).
        thresholds: each τ in [-1, 1] for `hard_count`.
        powers: each α above 0 for `power_count`.
        chunk_size: rows of a block of similarities, at least 1; memory grows with its square.

    Returns:
        The counts, each of shape (Q,), and the number of reference samples that were counted.

    Raises:
        NetsimError: the shapes do not fit, or a threshold or power is out of range.

    Source: Charpiat et al., NeurIPS 2019, section 4.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> result = neighbor_count(features, thresholds=[0.7])
        >>> result.hard[0.7].tolist(), result.num_reference
        ([2.0, 2.0, 1.0], 3)
    """
    taus = check_numbers("thresholds", thresholds, -1, 1)
    alphas = tuple(check_positive_number("powers", power) for power in powers)
    soft = soft_count(query, reference, chunk_size)
    hard, power = _blockwise_counts(query, reference, taus, alphas, chunk_size)
    counted = query if reference is None else reference
    num_reference = sum(int(usable_rows(block).sum()) for block in torch.split(counted, chunk_size))
    return NeighborCountResult(soft=soft, num_reference=num_reference, hard=hard, power=power)


def _blockwise_counts(
    query: Tensor, reference: Tensor | None, thresholds: tuple[float, ...], powers: tuple[float, ...], chunk_size: int
) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """Return {τ: hard count} and {α: power count}, from blocks of similarities in the precision of the features."""
    reference = check_features(query, reference)
    check_positive_int("chunk_size", chunk_size)
    if not thresholds and not powers:
        return {}, {}
    like = upcast(query)
    common = torch.promote_types(like.dtype, upcast(reference).dtype)
    tolerance = _TOLERANCE_EPS * torch.finfo(common).eps
    hard: dict[float, list[Tensor]] = {tau: [] for tau in thresholds}
    power: dict[float, list[Tensor]] = {alpha: [] for alpha in powers}
    with full_precision(query):
        for rows in torch.split(query, chunk_size):
            left_out = torch.where(usable_rows(rows), 0.0, torch.nan).to(common)
            for counts in (*hard.values(), *power.values()):
                counts.append(left_out)
            for columns in torch.split(reference, chunk_size):
                similarity = rows.to(common) @ columns[usable_rows(columns)].to(common).mT
                for tau, counts in hard.items():
                    counts[-1] = counts[-1] + (similarity >= tau - tolerance).sum(dim=1)
                for alpha, counts in power.items():
                    counts[-1] = counts[-1] + similarity.clamp_min(0.0).pow(alpha).sum(dim=1)
    return {tau: torch.cat(counts).to(like) for tau, counts in hard.items()}, {
        alpha: torch.cat(counts).to(like) for alpha, counts in power.items()
    }
