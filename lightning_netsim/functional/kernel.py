"""Compare inputs through their gradients: the kernel K = GᵀG', its normalized form and its scalars.

Source: Charpiat et al., NeurIPS 2019, sections 2 and 3, and sections 2 and 3 of its supplementary material. Throughout, a
per-sample Jacobian has shape (B, d, P): row a of sample i is the gradient of output a with respect to the P parameters.
Half-precision input is upcast to float32 and autocast is switched off.

A scalar turns the normalized kernel matrix K^C of a pair of samples into one number. Each is 1 for a sample with itself; where
C is rank-deficient, √(r r') takes the place of d so that this stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_same_size, check_tensor, expected
from lightning_netsim.functional._once import forbid_second_derivative
from lightning_netsim.functional._precision import full_precision, to_double, upcast

FLOOR_FLOAT32 = 1e-6
FLOOR_FLOAT64 = 1e-12
_BLOCK_ELEMENTS = 2**24


def default_floor(digits: torch.dtype) -> float:
    """Return the share of the largest eigenvalue below which one counts as 0, for gradients of a precision."""
    return FLOOR_FLOAT64 if digits == torch.float64 else FLOOR_FLOAT32


class _InverseRoot(torch.autograd.Function):
    """Pseudo-inverse square root of symmetric float64 matrices, with the derivative at constant rank.

    The derivative uses divided differences in closed form, so equal eigenvalues give no 0/0 (that of `eigh` does).
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(gram)
        largest = values[..., -1:]
        kept = (values > floor * largest) & (largest > 0)
        inverse = torch.where(kept, values, 1.0).rsqrt() * kept
        ctx.save_for_backward(gram, inverse, vectors)
        rank = kept.sum(dim=-1)
        ctx.mark_non_differentiable(rank)
        return (vectors * inverse.unsqueeze(-2)) @ vectors.mT, rank

    @staticmethod
    def backward(ctx: Any, grad_root: Tensor, _: Tensor) -> tuple[Tensor, None]:
        gram, inverse, vectors = ctx.saved_tensors
        row, column = inverse.unsqueeze(-1), inverse.unsqueeze(-2)
        total = row + column
        both = -((row * column) ** 2) / torch.where(total > 0, total, 1.0)
        # One eigenvalue kept and one dropped (taken as 0): (λ^(-1/2) - 0) / (λ - 0).
        difference = torch.where((row > 0) & (column > 0), both, total**3)
        inner = vectors.mT @ grad_root @ vectors
        return forbid_second_derivative(vectors @ (difference * inner) @ vectors.mT, gram), None


def inverse_root(gram: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute the pseudo-inverse square root M = C^(+1/2) of Gram matrices and their rank.

    M = Σ_{λ_a > floor·λ_max} λ_a^(-1/2) v_a v_aᵀ, by an eigendecomposition in float64. Differentiable once, also where
    eigenvalues are equal. A zero or non-finite C gives M = 0 and rank 0 and never raises, for the caller to count.

    Args:
        gram: shape (..., d, d), symmetric positive semi-definite C(x) = GᵀG.
        floor: in [0, 1), the share of the largest eigenvalue below which an eigenvalue counts as 0. By default 1e-6 for
            float32 and lower precisions, 1e-12 for float64.

    Returns:
        The root, shape (..., d, d), in the dtype of `gram` (float32 for half precision), and the rank, shape (...,), int64.

    Raises:
        NetsimError: `gram` is not a floating-point stack of square matrices, or `floor` is outside [0, 1).

    Source: Charpiat et al., NeurIPS 2019, section 3.2 of the supplementary material.

    Example:
        >>> root, rank = inverse_root(torch.diag(torch.tensor([4.0, 0.0])))
        >>> root.tolist(), int(rank)
        ([[0.5, 0.0], [0.0, 0.0]], 1)
    """
    check_tensor("gram", gram)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise expected("gram", "a floating-point tensor of shape (..., d, d)", f"shape {tuple(gram.shape)}")
    floor = default_floor(gram.dtype) if floor is None else floor
    if not 0 <= floor < 1:
        raise expected("floor", "in [0, 1)", repr(floor))
    with full_precision(gram):
        double = to_double(gram)
        finite = torch.isfinite(double).all(dim=-1).all(dim=-1)
        safe = torch.where(finite[..., None, None], double, 0.0)
        root, rank = _InverseRoot.apply((safe + safe.mT) / 2, floor)
    return root.to(upcast(gram)), rank.to(gram.device)


def kernel_matrix(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Compute the kernel K(x, x')_ab = ∇f^a(x) · ∇f^b(x') of all pairs of samples.

    Args:
        x: shape (B, d, P), per-sample Jacobian.
        y: shape (B', d', P), another one; by default `x` itself.

    Returns:
        Shape (B, B', d, d').

    Raises:
        NetsimError: `x` or `y` is not a floating-point tensor of three dimensions, or their P differ.

    Source: Charpiat et al., NeurIPS 2019, section 3 (eq. 1 of the supplementary material).

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> kernel_matrix(x).tolist()
        [[[[1.0, 0.0], [0.0, 4.0]]]]
    """
    x = upcast(check_tensor("x", x, 3, like="(B, d, P)"))
    y = x if y is None else upcast(check_tensor("y", y, 3, like="(B', d, P)"))
    check_same_size("y", y, "x", x, dim=2)
    with full_precision(x):
        flat = x.flatten(0, 1) @ y.flatten(0, 1).mT
    return flat.reshape(x.shape[0], x.shape[1], y.shape[0], y.shape[1]).transpose(1, 2)


def normalized_kernel_matrix(kernel: Tensor, root_x: Tensor, root_y: Tensor) -> Tensor:
    """Compute K^C(x, x') = C(x)^(-1/2) K(x, x') C(x')^(-1/2) of all pairs of samples.

    K^C(x, x) = Id where C has full rank; its entries lie in [-1, 1], |tr| ≤ d, ‖K^C‖_F ≤ √d, and K^C(x', x) = K^C(x, x')ᵀ.

    Args:
        kernel: shape (B, B', d, d), from `kernel_matrix`.
        root_x: shape (B, d, d), from `inverse_root`.
        root_y: shape (B', d, d), the same for the second set.

    Returns:
        Shape (B, B', d, d).

    Raises:
        NetsimError: a shape does not fit.

    Source: Charpiat et al., NeurIPS 2019, section 3 (eq. 2 of the supplementary material).

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> root, _ = inverse_root(kernel_matrix(x)[:, 0])
        >>> normalized_kernel_matrix(kernel_matrix(x), root, root).tolist()
        [[[[1.0, 0.0], [0.0, 1.0]]]]
    """
    kernel = upcast(check_tensor("kernel", kernel, 4, like="(B, B', d, d)"))
    root_x = upcast(check_tensor("root_x", root_x, 3, like="(B, d, d)"))
    root_y = upcast(check_tensor("root_y", root_y, 3, like="(B', d, d)"))
    for name, root, size in (("root_x", root_x, kernel.shape[0::2]), ("root_y", root_y, kernel.shape[1::2])):
        if root.shape[:2] != size or root.shape[1] != root.shape[2]:
            raise expected(name, f"of shape {(*size, size[1])} to fit `kernel`", f"shape {tuple(root.shape)}")
    with full_precision(kernel):
        return root_x.unsqueeze(1) @ kernel @ root_y.unsqueeze(0)


def orthonormal_gradients(x: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor]:
    """Decorrelate and normalize gradients: G^N = G C^(+1/2), whose rows are orthonormal where C has full rank.

    The feature vector of the similarity is φ(x) = vec(G^N) / √r, so that k^C(x, x') = φ(x) · φ(x'). C and the product are
    formed in float64, since ill-conditioned C are common.

    Args:
        x: shape (B, d, P), per-sample Jacobian.
        floor: see `inverse_root`; by default that of the dtype of `x`.

    Returns:
        Shape (B, d, P), zero for a sample with a zero or non-finite gradient, and the rank, shape (B,), int64.

    Raises:
        NetsimError: `x` is not a floating-point tensor of three dimensions, or `floor` is outside [0, 1).

    Source: Charpiat et al., NeurIPS 2019, section 3.2 of the supplementary material.

    Example:
        >>> orthonormal, rank = orthonormal_gradients(torch.tensor([[[3.0, 4.0]]]))
        >>> [round(v, 6) for v in orthonormal.flatten().tolist()], rank.tolist()
        ([0.6, 0.8], [1])
    """
    x = upcast(check_tensor("x", x, 3, like="(B, d, P)"))
    floor = default_floor(x.dtype) if floor is None else floor
    blocks, ranks = [], []
    with full_precision(x):
        for block in torch.split(x, max(1, _BLOCK_ELEMENTS // max(1, x[:1].numel()))):
            double = to_double(block)
            finite = torch.isfinite(double).all(dim=-1).all(dim=-1)
            double = torch.where(finite[:, None, None], double, 0.0)
            root, rank = inverse_root(double @ double.mT, floor)
            blocks.append((root @ double).to(x))
            ranks.append(rank)
    return torch.cat(blocks), torch.cat(ranks).to(x.device)


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
    return normalized.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / size


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
    distance2 = (normalized - eye).square().sum(dim=(-2, -1)) - (width - size)
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
    return normalized.square().sum(dim=(-2, -1)) / size


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


SCALARS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "trace": trace_similarity,
    "identity_distance": identity_distance_similarity,
    "identity_distance_squared": partial(identity_distance_similarity, squared=True),
    "subspace": subspace_similarity,
    "rotation": rotation_similarity,
}


def pairwise_similarity(x: Tensor, y: Tensor | None = None, scalar: str = "trace") -> Tensor:
    """Compute the similarity of all pairs of samples, by default k^C(x, x') = tr(K^C(x, x')) / √(r r').

    Dividing by √(r r') rather than by d keeps k(x, x) = 1 where outputs depend on each other (probabilities sum to one).

    Args:
        x: shape (B, d, P), per-sample Jacobian, or (B, P) for one output.
        y: shape (B', d, P) or (B', P); by default `x` itself.
        scalar: "trace", "identity_distance", "identity_distance_squared", "subspace" or, for d = 2, "rotation".

    Returns:
        Shape (B, B'), in [-1, 1] up to rounding; NaN in the rows and columns of samples with a zero or non-finite gradient.

    Raises:
        NetsimError: the shapes do not fit, or `scalar` is unknown.

    Source: Charpiat et al., NeurIPS 2019, sections 2 and 3.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
        >>> pairwise_similarity(x, x[:1]).squeeze(1).tolist()
        [1.0, 0.0, 1.0]
    """
    function = SCALARS[check_choice("scalar", scalar, SCALARS)]
    normal_x, rank_x = orthonormal_gradients(_three_dimensional("x", x))
    normal_y, rank_y = normal_x, rank_x
    if y is not None:
        normal_y, rank_y = orthonormal_gradients(_three_dimensional("y", y))
        check_same_size("y", normal_y, "x", normal_x, dim=1)
        check_same_size("y", normal_y, "x", normal_x, dim=2)
        common = torch.promote_types(normal_x.dtype, normal_y.dtype)
        normal_x, normal_y = normal_x.to(common), normal_y.to(common)
    rank = effective_rank(rank_x, rank_y).to(normal_x)
    usable = ~rank.isnan()
    rank = torch.where(usable, rank, 1.0)  # Dividing by NaN would reach the gradients of the usable samples.
    if scalar == "trace":  # One product, d times cheaper than the (B, B', d, d) kernel.
        with full_precision(normal_x):
            similarity = normal_x.flatten(1) @ normal_y.flatten(1).mT / rank
    else:
        similarity = function(kernel_matrix(normal_x, normal_y), rank)
    return torch.where(usable, similarity, torch.nan)


def _three_dimensional(name: str, value: Tensor) -> Tensor:
    check_tensor(name, value, (2, 3), like="(B, d, P) or (B, P)")
    return value.unsqueeze(1) if value.ndim == 2 else value


def transfer(kernel: Tensor, gram: Tensor, floor: float | None = None) -> Tensor:
    """Predict how a move of f(x) moves f(x'): the matrix K(x', x) C(x)⁺.

    Changing the parameters as little as possible so that f(x) moves by v moves f(x') by K(x', x) C(x)⁺ v, to first order.

    Args:
        kernel: shape (..., d', d), K(x', x).
        gram: shape (..., d, d), C(x).
        floor: see `inverse_root`.

    Returns:
        Shape (..., d', d).

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 3 (eq. 1 of the supplementary material).

    Example:
        >>> transfer(torch.tensor([[2.0]]), torch.tensor([[4.0]])).item()
        0.5
    """
    kernel = upcast(check_tensor("kernel", kernel))
    root, _ = inverse_root(gram, floor)
    if kernel.ndim < 2 or kernel.shape[-1] != root.shape[-1]:
        raise expected("kernel", f"of shape (..., d', {root.shape[-1]}) to fit `gram`", f"shape {tuple(kernel.shape)}")
    with full_precision(kernel):
        return kernel @ root @ root
