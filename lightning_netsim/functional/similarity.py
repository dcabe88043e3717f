"""Criteria that make a network treat given inputs as the same thing, as functions of similarities.

Source: Charpiat et al., NeurIPS 2019, section 4.2 ("other possible uses") and section 5 ("enforcing similarity") of the
supplementary material. All are to be minimized. `lightning_netsim.losses` has the same as modules, which take the factored
gradients of a batch and are many times faster than what is computed from a full matrix of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_numbers, check_positive_int, check_same_size, check_tensor, expected
from lightning_netsim.functional._precision import full_precision, upcast


def pair_similarity_loss(similarity: Tensor) -> Tensor:
    """Compute −mean k(x_i, x'_i) over given pairs.

    Args:
        similarity: shape (n,), k of each pair, in [-1, 1]. NaN stands for a sample that was left out, and its pairs are too.

    Returns:
        A scalar in [-1, 1]; zero, on the graph, where there is no pair.

    Raises:
        NetsimError: `similarity` is not a floating-point vector.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> pair_similarity_loss(torch.tensor([1.0, 0.5])).item()
        -0.75
    """
    similarity = upcast(check_tensor("similarity", similarity, 1, like="(n,)"))
    kept = similarity[~similarity.isnan()]
    return -kept.mean() if len(kept) else similarity.nan_to_num().sum()


def group_mean_similarity(squared_norm: Tensor, size: Tensor | int) -> Tensor:
    """Compute the mean similarity of all pairs of a group, n/(n−1) ‖μ‖² − 1/(n−1), from the mean μ of its unit gradients.

    The variance of the unit gradients is 1 − ‖μ‖², so that maximizing one is minimizing the other.

    Args:
        squared_norm: ‖μ‖², any shape, in [0, 1].
        size: n of each group, at least 2, of the same shape or one number.

    Returns:
        The mean of k(x_i, x_j) over i ≠ j, of the shape of `squared_norm`.

    Raises:
        NetsimError: `squared_norm` is not floating-point, or a group has fewer than two samples.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> group_mean_similarity(torch.tensor([1.0, 0.5]), 2).tolist()
        [1.0, 0.0]
    """
    squared_norm = upcast(check_tensor("squared_norm", squared_norm))
    size = torch.as_tensor(size, dtype=squared_norm.dtype, device=squared_norm.device)
    if bool((size < 2).any()):
        raise expected("size", "at least 2 samples in each group", f"{size.min():g}")
    return (size * squared_norm - 1) / (size - 1)


def group_similarity_loss(similarity: Tensor, labels: Tensor) -> Tensor:
    """Compute minus the mean similarity of all pairs within each group, averaged over the groups.

    For one group of n samples that is −1/(n(n−1)) Σ_{i≠j} k(x_i, x_j). A group with a single sample has no pair and does not
    count.

    Args:
        similarity: shape (B, B), k of all pairs; rows and columns of NaN stand for samples that were left out.
        labels: shape (B,), the group of each sample; negative for a sample without one.

    Returns:
        A scalar in [-1, 1]; zero, on the graph, where no group has two samples.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> group_similarity_loss(similarity, torch.tensor([7, 7, 8])).item()
        -0.5
    """
    similarity = upcast(check_tensor("similarity", similarity, 2, like="(B, B)"))
    check_same_size("similarity", similarity, "similarity", similarity.mT, dim=0)
    if not isinstance(labels, Tensor) or labels.shape != similarity.shape[:1]:
        got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise expected("labels", f"a tensor of shape ({len(similarity)},) to fit `similarity`", got)
    usable = ~similarity.diagonal().isnan()
    members = group_members(labels[usable]).to(similarity)
    sizes = members.sum(0)
    if not len(sizes):
        return similarity.nan_to_num().sum() * 0
    kept = similarity[usable][:, usable]
    with full_precision(kept):
        squared_norms = ((kept @ members) * members).sum(0) / sizes.square()
    return -group_mean_similarity(squared_norms, sizes).mean()


def group_members(labels: Tensor) -> Tensor:
    """Return which samples belong to each group of two or more, shape (B, number of such groups), bool.

    Args:
        labels: shape (B,), the group of each sample; one with a negative label, as unlabeled samples have, belongs to none.

    Example:
        >>> group_members(torch.tensor([7, 8, 7])).tolist()
        [[True], [False], [True]]
    """
    groups, sizes = torch.unique(labels, return_counts=True)
    members: Tensor = labels.unsqueeze(1) == groups[(sizes > 1) & (groups >= 0)]
    return members


def minibatch_similarity_loss(first: Tensor, second: Tensor, batch_size: int) -> Tensor:
    """Compute the criterion of two mini-batches, n_B ‖μ₁ − μ₂‖² / (‖μ₁‖ ‖μ₂‖), from their mean gradients.

    Gradients are not normalized sample by sample: their means are all that ordinary back-propagation gives. The factor n_B
    makes up for the smaller variance of means over more samples.

    Args:
        first: μ₁, shape (P,), the mean gradient of the first n_B samples.
        second: μ₂, shape (P,).
        batch_size: n_B, at least 1.

    Returns:
        A scalar, at least 0; zero, on the graph, where a mean is zero or not finite.

    Raises:
        NetsimError: the shapes do not fit.

    Source: Charpiat et al., NeurIPS 2019, section 5 of the supplementary material.

    Example:
        >>> round(minibatch_similarity_loss(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), batch_size=4).item(), 5)
        2.0
    """
    first = upcast(check_tensor("first", first, 1, like="(P,)"))
    second = upcast(check_tensor("second", second, 1, like="(P,)"))
    check_same_size("second", second, "first", first, dim=0)
    check_positive_int("batch_size", batch_size)
    scale = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    if not bool(torch.isfinite(scale) & (scale > 0)):
        return (first.nan_to_num(0, 0, 0).sum() + second.nan_to_num(0, 0, 0).sum()) * 0
    # Divided before it is squared, so that small gradients do not vanish.
    distance: Tensor = (first - second) / scale.sqrt()
    return batch_size * distance.square().sum()


def density_loss(fraction: Tensor, target: float | Sequence[float], reduction: str = "mean") -> Tensor:
    """Compute the density homogeneity Σ_i (N_S(x_i)/n − q)², or the squared distance of N_S/n from a range [q₁, q₂].

    Args:
        fraction: shape (B,), the soft count of each sample as a share of the number n of samples; NaN is left out.
        target: q in [0, 1], or the range (q₁, q₂).
        reduction: "sum" as in the paper, or "mean", which does not depend on the batch size.

    Returns:
        A scalar, at least 0.

    Raises:
        NetsimError: `fraction` is not a floating-point vector, or the target is not one or two numbers within [0, 1].

    Source: Charpiat et al., NeurIPS 2019, section 4.2 of the supplementary material.

    Example:
        >>> round(density_loss(torch.tensor([0.2, 0.5]), target=0.3, reduction="sum").item(), 4)
        0.05
        >>> round(density_loss(torch.tensor([0.2, 0.5]), target=(0.1, 0.4), reduction="sum").item(), 4)
        0.01
    """
    fraction = upcast(check_tensor("fraction", fraction, 1, like="(B,)"))
    check_choice("reduction", reduction, ("mean", "sum"))
    low, high = density_range(target)
    distance = fraction - fraction.detach().clamp(low, high)
    squares = distance[~distance.isnan()].square()
    return squares.sum() / (max(1, len(squares)) if reduction == "mean" else 1)


def density_range(target: float | Sequence[float]) -> tuple[float, float]:
    """Return the range (q₁, q₂) that a target stands for: q₁ = q₂ for a single number."""
    bounds = [target] if isinstance(target, (int, float)) else target
    numeric = isinstance(bounds, Sequence) and all(isinstance(bound, (int, float)) for bound in bounds)
    bounds = check_numbers("target", bounds, 0, 1) if numeric else ()
    if len(bounds) not in (1, 2) or bounds[0] > bounds[-1]:
        raise expected("target", "a share in [0, 1], or a range (low, high) of shares", repr(target))
    return bounds[0], bounds[-1]


def tangent_loss(derivative: Tensor) -> Tensor:
    """Compute mean_i ‖∂_x ∇_θ f(x_i) · e(x_i)‖² from the derivatives of the gradients in the direction e.

    It is the limit of ‖∇_θ f(x) − ∇_θ f(x + ε e)‖² / ε², summed over the d directions of the output.

    Args:
        derivative: shape (B, d, P), the derivative of the per-sample Jacobian.

    Returns:
        A scalar, at least 0.

    Raises:
        NetsimError: `derivative` is not a floating-point tensor of three dimensions.

    Source: Charpiat et al., NeurIPS 2019, section 5.1 of the supplementary material.

    Example:
        >>> tangent_loss(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])).item()
        13.0
    """
    derivative = upcast(check_tensor("derivative", derivative, 3, like="(B, d, P)"))
    return derivative.square().sum() / max(1, len(derivative))
