"""Turn the normalized kernel matrix K^C of a pair of samples into one number.

Source: Charpiat et al., NeurIPS 2019, section 3, and sections 3.3 and 3.4 of its supplementary material. Each scalar is 1 for
a sample with itself; where C is rank-deficient, √(r r') takes the place of d so that this stays true.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_netsim._checks import check_tensor, expected
from lightning_netsim.functional._precision import to_double, upcast


def effective_rank(rank_x: Tensor, rank_y: Tensor) -> Tensor:
    """Compute √(r r') of all pairs of samples, by which the scalars of K^C are divided; NaN where a rank is 0.

    Args:
        rank_x: shape (B,), int64, from `inverse_root`.
        rank_y: shape (B',), int64.

    Returns:
        Shape (B, B'), float64.

    Example:
        >>> effective_rank(torch.tensor([4, 0]), torch.tensor([1])).tolist()
        [[2.0], [nan]]
    """
    product = to_double(rank_x).unsqueeze(-1) * to_double(rank_y)
    return torch.where(product > 0, product, torch.nan).sqrt().to(rank_x.device)


def _squares(normalized: Tensor) -> Tensor:
    return normalized.square().sum(dim=(-2, -1))


def _trace(normalized: Tensor) -> Tensor:
    return normalized.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _matrices(normalized: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check K^C and return it with the number that its scalars are divided by."""
    check_tensor("normalized", normalized)
    if normalized.ndim < 2 or normalized.shape[-1] != normalized.shape[-2]:
        raise expected("normalized", "a floating-point tensor of shape (..., d, d)", f"shape {tuple(normalized.shape)}")
    normalized = upcast(normalized)
    size = normalized.new_tensor(float(normalized.shape[-1])) if rank is None else rank.to(normalized)
    return normalized, size


def _safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose gradient at 0 is finite: the eps inside moves a root of 0 to the rounding error of its dtype."""
    return (value.clamp_min(0.0) + torch.finfo(value.dtype).eps ** 2).sqrt()


def trace_similarity(normalized: Tensor, rank: Tensor | None = None) -> Tensor:
    """Compute the default similarity k^C = tr(K^C) / √(r r').

    Args:
        normalized: shape (..., d, d), K^C.
        rank: shape broadcastable to (...,), √(r r') from `effective_rank`; by default d (full rank).

    Returns:
        Shape (...,), in [-1, 1].

    Source: Charpiat et al., NeurIPS 2019, section 3 (eq. 3 of the supplementary material).

    Example:
        >>> trace_similarity(torch.diag(torch.tensor([1.0, 0.0]))).item()
        0.5
    """
    normalized, size = _matrices(normalized, rank)
    return _trace(normalized) / size


def identity_distance_similarity(normalized: Tensor, rank: Tensor | None = None, squared: bool = False) -> Tensor:
    """Compute 1 - ‖K^C - Id‖_F / √d, or 1 - ‖K^C - Id‖²_F / (2d) if `squared`.

    In terms of the other scalars, 1 - ‖K^C - Id‖²_F / (2d) = tr/d + ½ (1 - ‖K^C‖²_F / d). Where a rank is below d, √(r r')
    takes the place of d in that identity: if both samples have the same range, Id is then the projector on it.

    Args:
        normalized: shape (..., d, d), K^C.
        rank: shape broadcastable to (...,), √(r r') from `effective_rank`; by default d (full rank).
        squared: use the squared distance.

    Returns:
        Shape (...,), in [-1, 1].

    Source: Charpiat et al., NeurIPS 2019, section 3.3 of the supplementary material.

    Example:
        >>> identity_distance_similarity(torch.eye(2), squared=True).item()
        1.0
    """
    normalized, size = _matrices(normalized, rank)
    width = normalized.shape[-1]
    eye = torch.eye(width, dtype=normalized.dtype, device=normalized.device)
    distance2 = _squares(normalized - eye) - (width - size)
    return 1 - distance2 / (2 * size) if squared else 1 - _safe_sqrt(distance2) / size.sqrt()


def subspace_similarity(normalized: Tensor, rank: Tensor | None = None) -> Tensor:
    """Compute ‖K^C‖²_F / √(r r'): whether the gradients of two samples span the same subspace, whatever the directions.

    Args:
        normalized: shape (..., d, d), K^C.
        rank: shape broadcastable to (...,), √(r r') from `effective_rank`; by default d (full rank).

    Returns:
        Shape (...,), in [0, 1].

    Source: Charpiat et al., NeurIPS 2019, section 3.4 of the supplementary material.

    Example:
        >>> subspace_similarity(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).item()
        1.0
    """
    normalized, size = _matrices(normalized, rank)
    return _squares(normalized) / size


def rotation_similarity(normalized: Tensor, rank: Tensor | None = None) -> Tensor:
    """Compute √(‖K^C‖²_F + 2 det K^C) / √(r r') for d = 2: the best trace similarity over rotations of the output.

    Args:
        normalized: shape (..., 2, 2), K^C.
        rank: shape broadcastable to (...,), √(r r') from `effective_rank`; by default 2 (full rank).

    Returns:
        Shape (...,), in [0, 1].

    Raises:
        NetsimError: d is not 2.

    Source: Charpiat et al., NeurIPS 2019, section 3.4 of the supplementary material.

    Example:
        >>> rotation_similarity(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).item()
        1.0
    """
    normalized, size = _matrices(normalized, rank)
    if normalized.shape[-1] != 2:
        raise expected("normalized", "of shape (..., 2, 2)", f"shape {tuple(normalized.shape)}", "Rotations need d = 2.")
    cosine = normalized[..., 0, 0] + normalized[..., 1, 1]
    sine = normalized[..., 0, 1] - normalized[..., 1, 0]
    return _safe_sqrt(cosine.square() + sine.square()) / size


def _identity_distance_squared(normalized: Tensor, rank: Tensor | None = None) -> Tensor:
    return identity_distance_similarity(normalized, rank, squared=True)


SCALARS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "trace": trace_similarity,
    "identity_distance": identity_distance_similarity,
    "identity_distance_squared": _identity_distance_squared,
    "subspace": subspace_similarity,
    "rotation": rotation_similarity,
}
