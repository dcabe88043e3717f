"""The maximum mean discrepancy of two sets of samples: how far apart their distributions are, as a kernel sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import check_finite, check_same_size, check_tensor, expected
from lightning_netsim.functional._once import forbid_second_derivative
from lightning_netsim.functional._precision import full_precision, to_double, upcast
from lightning_netsim.functional.random_features import check_bandwidths, fourier_features

#: (x (N, K), y (M, K)) -> symmetric, positive semi-definite similarities (N, M), differentiable.
Kernel = Callable[[Tensor, Tensor], Tensor]

# Rows of a block of similarities: a block stays in the cache, and rows begin where fast products want them.
_BLOCK_ROWS = 1024
# Samples among which the median distance is looked up.
_MEDIAN_ROWS = 256


def gaussian_kernel(x: Tensor, y: Tensor | None = None, bandwidths: float | Sequence[float] = 1.0) -> Tensor:
    """Compute the Gaussian kernel of all pairs, the mean of exp(−‖x − y‖²/(2σ²)) over the bandwidths σ.

    Args:
        x: shape (N, K).
        y: shape (M, K); None for x itself.
        bandwidths: σ, or several, in the units of the samples.

    Returns:
        Shape (N, M), within [0, 1], in float32 or better.

    Raises:
        NetsimError: for tensors that are not floating-point matrices of one width, or a bandwidth that is not positive.

    Example:
        >>> gaussian_kernel(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    sigmas = check_bandwidths("bandwidths", bandwidths)
    x = upcast(check_tensor("x", x, 2, like="(N, K)"))
    y = x if y is None else upcast(check_tensor("y", y, 2, like="(M, K)"))
    check_same_size("y", y, "x", x, dim=1)
    center = y.detach().mean(0) if len(y) else 0.0
    with full_precision(x):
        distances = _squared_distances(x - center, y - center)
    parts = [torch.exp(distances * (-0.5 / sigma**2)) for sigma in sigmas]
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def median_distance(x: Tensor, y: Tensor | None = None) -> float:
    """Compute the median of the distances between samples of both sets together: a bandwidth in their own units.

    Of more than 256 samples, 256 at equal steps are compared. Where half of the samples are equal, so that the median is 0, it
    is the mean of the other distances; 1 where all are equal. Not differentiable.

    Args:
        x: shape (N, K).
        y: shape (M, K), or None.

    Returns:
        A positive number.

    Raises:
        NetsimError: for tensors that are not finite floating-point matrices of one width.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, section 8.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
        2.0
    """
    x, y = check_samples(x, x[:0] if y is None and isinstance(x, Tensor) else y)
    pooled = torch.cat([x.detach(), y.detach()])
    if len(pooled) > _MEDIAN_ROWS:
        pooled = pooled[torch.linspace(0, len(pooled) - 1, _MEDIAN_ROWS, device=pooled.device).long()]
    pooled = to_double(pooled)
    first, second = torch.triu_indices(len(pooled), len(pooled), offset=1, device=pooled.device)
    pooled = pooled - pooled.mean(0)
    distances = _squared_distances(pooled, pooled)[first, second].sqrt()
    least = 1e-6 * float(distances.max()) if len(distances) else 0.0  # Less is what rounding leaves between equal samples.
    if not least:
        return 1.0
    median = float(distances.median())
    return median if median > least else float(distances[distances > least].mean())


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel = gaussian_kernel, unbiased: bool = False) -> Tensor:
    """Compute the squared maximum mean discrepancy of two sets, mean k(x, x') + mean k(y, y') − 2 mean k(x, y).

    Similarities are formed block by block and their gradient on the way, so that memory grows with N + M.

    Args:
        x: samples, shape (N, K).
        y: samples, shape (M, K).
        kernel: symmetric function of (x, y), as `gaussian_kernel`, `arc_cosine_kernel` or a
            `functools.partial` of one; it does not learn.
        unbiased: leave each sample's similarity to itself out of the means: an estimate with the right expectation, which can
            be negative. The biased one is never below zero, exactly 0 for equal batches, and the one to train with.

    Returns:
        A scalar in the dtype of the samples (float32 or better). Differentiable once, with respect to x and y.

    Raises:
        NetsimError: a set is empty (or, unbiased, has one sample), not finite, not a floating-point matrix, or of another
            width than the other.

    Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, equations 3 and 5.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
        >>> squared_mmd(x, y), squared_mmd(x, y, unbiased=True)
        (tensor(0.4323), tensor(-0.2588))
        >>> squared_mmd(x, x)
        tensor(0.)
    """
    x, y = check_samples(x, y, at_least=2 if unbiased else 1)
    y = y.to(x)
    with full_precision(x):
        own = [_PairSum.apply(some, None, kernel, unbiased) / (len(some) * (len(some) - int(unbiased))) for some in (x, y)]
        between = _PairSum.apply(x, y, kernel, False) / (len(x) * len(y))
    discrepancy: Tensor = own[0] + own[1] - 2 * between
    if not unbiased:  # What rounding took below zero; the gradient stays.
        discrepancy = discrepancy + discrepancy.detach().clamp_max(0).neg()
    return discrepancy.to(x)


def random_feature_mmd(x: Tensor, y: Tensor, frequencies: Tensor, unbiased: bool = False) -> Tensor:
    """Estimate the squared maximum mean discrepancy of a Gaussian kernel, ‖mean φ(x) − mean φ(y)‖², in linear time.

    Args:
        x: samples, shape (N, K).
        y: samples, shape (M, K).
        frequencies: of the random Fourier features φ, shape (r/2, K), see `draw_frequencies`.
        unbiased: leave each sample's similarity to itself out, see `squared_mmd`.

    Returns:
        A scalar in the dtype of the samples (float32 or better): of these features' kernel exactly, of the Gaussian kernel
        with a relative error that falls as 1/√r.

    Raises:
        NetsimError: as `squared_mmd`; or frequencies are of another width.

    Source: Rahimi and Recht, NeurIPS 2007; Zhao and Meng, FastMMD, Neural Computation 2015.

    Example:
        >>> from lightning_netsim.functional import draw_frequencies
        >>> x, generator = torch.tensor([[0.0], [1.0]]), torch.Generator().manual_seed(0)
        >>> random_feature_mmd(x, x + 5, draw_frequencies(4096, 1, 1.0, generator))
        tensor(1.5572)
        >>> squared_mmd(x, x + 5)
        tensor(1.6064)
    """
    x, y = check_samples(x, y, at_least=2 if unbiased else 1)
    means = [fourier_features(some, frequencies).mean(0) for some in (x, y.to(x))]
    if not unbiased:
        return (means[0] - means[1]).square().sum()
    # Each sample has similarity 1 to itself.
    own = [(len(some) * mean.square().sum() - 1) / (len(some) - 1) for some, mean in zip((x, y), means, strict=True)]
    return own[0] + own[1] - 2 * (means[0] * means[1]).sum()


def check_samples(x: Tensor, y: Tensor | None, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Return both sets in float32 or better, if they are finite matrices of one width with enough rows."""
    checked = []
    for name, some, like in (("x", x, "(N, K)"), ("y", y, "(M, K)")):
        some = check_finite(name, check_tensor(name, some, 2, like=like))
        if len(some) < at_least:
            wanted = "two or more samples, without their similarity to themselves" if at_least > 1 else "one or more samples"
            raise expected(name, wanted, f"shape {tuple(some.shape)}")
        checked.append(upcast(some).contiguous())  # Products of other strides round otherwise, and equal sets would differ.
    check_same_size("y", checked[1], "x", checked[0], dim=1)
    return checked[0], checked[1]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ‖x − y‖² of all pairs, shape (N, M), by a matrix product, of samples around the origin: far from it, digits go."""
    products = torch.addmm(y.square().sum(1), x, y.mT, alpha=-2)
    return (products + x.square().sum(1, keepdim=True)).clamp_min(0)


class _PairSum(torch.autograd.Function):
    """Σ_ij k(x_i, y_j) in float64, with the gradient found on the way, block by block; within x where y is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, kernel: Kernel, without_self: bool) -> Tensor:
        other = x if y is None else y
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        pulls = [torch.zeros_like(some) if want else None for some, want in zip((x, other), wanted, strict=True)]
        total = to_double(x.new_zeros(()))
        bandwidths = _gaussian_bandwidths(kernel)
        for row in range(0, len(x), _BLOCK_ROWS):
            for column in range(0, len(other), _BLOCK_ROWS):
                places = slice(row, row + _BLOCK_ROWS), slice(column, column + _BLOCK_ROWS)
                left, right, is_own = x[places[0]], other[places[1]], without_self and row == column
                if bandwidths is not None:
                    block, found = _gaussian_block(left, right, bandwidths, is_own, wanted)
                else:
                    block, found = _block(left, right, kernel, is_own, wanted)
                total += to_double(block)
                for pull, place, gradient in zip(pulls, places, found, strict=True):
                    if pull is not None and gradient is not None:
                        pull[place] += gradient
        # A kernel is symmetric: what a sample pulls from the one side, it pulls from the other.
        ctx.factor = 2 if y is None else 1
        ctx.save_for_backward(x, y, *pulls)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *pulls = ctx.saved_tensors
        inputs = [some for some in (x, y) if some is not None]
        scales = [
            None if pull is None else (ctx.factor * scale).to(pull) * forbid_second_derivative(pull, *inputs) for pull in pulls
        ]
        return *(scales if y is not None else (scales[0], None)), None, None


def _block(
    left: Tensor, right: Tensor, kernel: Kernel, without_self: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum of the similarities of a block, and its gradients with respect to both sides where they are wanted."""
    sides = [some.detach().requires_grad_(want) for some, want in zip((left, right), wanted, strict=True)]
    with torch.set_grad_enabled(any(wanted)):
        similarity = kernel(*sides)
        if not isinstance(similarity, Tensor) or similarity.shape != (len(left), len(right)):
            got = f"shape {tuple(similarity.shape)}" if isinstance(similarity, Tensor) else type(similarity).__name__
            wanted_shape = f"a function that returns the similarities of all pairs, here of shape {(len(left), len(right))}"
            raise expected("kernel", wanted_shape, got)
        if without_self:
            similarity = similarity - torch.diag(similarity.diagonal())
        total = similarity.sum()
    leaves = [side for side in sides if side.requires_grad]
    if not leaves or not total.requires_grad:
        return total.detach(), [None, None]
    found = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    return total.detach(), [next(found) if want else None for want in wanted]


def _gaussian_block(
    left: Tensor, right: Tensor, bandwidths: Sequence[float], without_self: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the same for the Gaussian kernel, several times as fast: Σ_j ∂k(x, y_j)/∂x = Σ_j s_j (y_j − x), s = k/σ²."""
    center = right.mean(0)
    left, right = left - center, right - center
    distances = _squared_distances(left, right)
    if without_self:
        distances.fill_diagonal_(torch.inf)
    total, slopes = distances.new_zeros(()), None
    for sigma in bandwidths:
        similarity = torch.exp(distances * (-0.5 / sigma**2))
        total += similarity.sum() / len(bandwidths)
        if any(wanted):
            slope = similarity.mul_(1 / (len(bandwidths) * sigma**2))
            slopes = slope if slopes is None else slopes.add_(slope)
    found: list[Tensor | None] = [None, None]
    if slopes is not None and wanted[0]:
        found[0] = slopes @ right - left * slopes.sum(1, keepdim=True)
    if slopes is not None and wanted[1]:
        found[1] = slopes.mT @ left - right * slopes.sum(0).unsqueeze(1)
    return total, found


def _gaussian_bandwidths(kernel: Kernel) -> tuple[float, ...] | None:
    """Return the bandwidths of `gaussian_kernel`, or of a `functools.partial` of it; None for another kernel."""
    given = kernel if isinstance(kernel, partial) else partial(kernel)
    if given.func is not gaussian_kernel or given.args or given.keywords.keys() - {"bandwidths"}:
        return None
    return check_bandwidths("bandwidths", given.keywords.get("bandwidths", 1.0))
