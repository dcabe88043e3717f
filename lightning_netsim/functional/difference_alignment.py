"""Align the differences of embeddings: the cross-total-variation (CTV) norm, and the regularizer made of it.

Source: Chen et al., Robust Similarity Learning with Difference Alignment Regularization (DASL), ICLR 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_embeddings, check_finite, check_labels, check_tensor, expected
from lightning_netsim.functional._once import forbid_second_derivative
from lightning_netsim.functional._precision import full_precision, upcast

NORMS = ("l1", "l2", "squared_l2")
DIFFERENCES = ("distance", "abs", "signed")

# Distances of a block; on a CUDA device the numbers of its differences, whose gradients are held there: 64 MB in float32.
_BLOCK_ELEMENTS = 2**24


def ctv_norm(differences: Tensor, norm: str = "l2", reduction: str = "sum") -> Tensor:
    """Compute the cross-total-variation norm Σ_{k<l} G(m_k − m_l) of H differences m_1, ..., m_H.

    It is 0 when all differences are the same. For a norm G it is a seminorm; the squared form is none. None of the three forms
    holds the H·H pairs: L1 sorts each coordinate, O(hH log H); squared L2 is H·Σ‖m_k − mean‖², O(hH); L2 compares all pairs in
    blocks, in O(hH²) time and O(hH) memory, and sorts where h = 1. Two equal differences have the gradient 0.

    Args:
        differences: shape (H, h), one difference in each row (the columns of M in the paper).
        norm: G: "l1", "l2" or "squared_l2", each summed over the h coordinates.
        reduction: "sum" as in the paper, or "mean" over the H(H − 1)/2 pairs, which does not depend on H.

    Returns:
        A scalar, at least 0, in float32 or better; zero, on the graph, for fewer than two differences. Differentiable once.

    Raises:
        NetsimError: `differences` is not a finite floating-point matrix, or a word is unknown.

    Source: Chen et al., ICLR 2024, equation of the regularizer and Theorem 1.

    Example:
        >>> ctv_norm(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])).item()
        10.0
        >>> ctv_norm(torch.tensor([[1.0], [2.0], [4.0]]), norm="squared_l2")
        tensor(14.0000)
    """
    check_choice("norm", norm, NORMS)
    check_choice("reduction", reduction, ("sum", "mean"))
    differences = upcast(check_finite("differences", check_tensor("differences", differences, 2, like="(H, h)")))
    size = len(differences)
    if size < 2:
        return differences.sum() * 0
    if norm == "squared_l2":
        total = size * (differences - differences.mean(0)).square().sum()
    elif norm == "l1" or differences.shape[1] == 1:
        total = _sorted_sum(differences)
    else:
        with full_precision(differences):
            total = _PairwiseDistanceSum.apply(differences)
    return total / (size * (size - 1) / 2) if reduction == "mean" else total


def difference_alignment_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    pairs: Tensor | None = None,
    difference: str = "distance",
    norm: str = "squared_l2",
) -> Tensor:
    """Compute how much the differences of embeddings of different classes vary: their CTV norm over its number of pairs.

    With m_1, ..., m_H the differences of the given pairs, pairs of one class left out, it is 2/(H(H − 1)) Σ_{k<l} G(m_k − m_l).
    `DifferenceAlignmentLoss` divides embeddings by their length before, and draws the pairs.

    Args:
        embeddings: shape (B, h).
        labels: shape (B,), the class of each sample or its pseudo-label; a sample with a negative one is left out. None
            takes every sample for a class of its own.
        pairs: shape (2, n), int64, the samples of each pair; None for all B(B − 1)/2.
        difference: of two embeddings z and z': their "distance" ‖z − z'‖, which all pairs of classes can share; or the
            vectors of the paper, "signed" z − z' or "abs" |z − z'| by coordinate, which three or more classes share only where
            their embeddings are the same.
        norm: G, see `ctv_norm`; of distances, L1 and L2 are the same.

    Returns:
        A scalar, at least 0, in the units of the embeddings (squared for "squared_l2"); zero, on the graph, where fewer than
        two pairs are left, as in a batch of one class.

    Raises:
        NetsimError: embeddings are not a finite floating-point matrix, labels have another length, or a word is unknown.

    Source: Chen et al., ICLR 2024. The distance form is this package's.

    Example:
        >>> corners = torch.eye(3)
        >>> difference_alignment_loss(corners, torch.tensor([0, 1, 2])).item()
        0.0
        >>> difference_alignment_loss(corners, torch.tensor([0, 1, 2]), difference="signed", norm="squared_l2")
        tensor(3.3333)
    """
    embeddings = upcast(check_embeddings("embeddings", embeddings))
    check_choice("difference", difference, DIFFERENCES)
    check_choice("norm", norm, NORMS)
    size = len(embeddings)
    chosen = torch.triu_indices(size, size, offset=1) if pairs is None else _check_pairs(pairs, size)
    first, second = chosen.to(embeddings.device)
    apart = first != second
    if labels is not None:
        labels = check_labels("labels", labels, size).to(embeddings.device)
        apart = (labels[first] != labels[second]) & (labels[first] >= 0) & (labels[second] >= 0)
    first, second = first[apart], second[apart]
    if difference == "distance" and pairs is None:  # Without h numbers for each pair. (The backward pass of pdist can crash.)
        distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        return ctv_norm(distances[first, second].unsqueeze(1), norm, reduction="mean")
    gap = embeddings[first] - embeddings[second]
    if difference == "distance":
        gap = torch.linalg.vector_norm(gap, dim=1, keepdim=True)  # Its gradient at 0 is 0.
    return ctv_norm(gap.abs() if difference == "abs" else gap, norm, reduction="mean")


def _check_pairs(pairs: Tensor, size: int) -> Tensor:
    wanted = "an int64 tensor of shape (2, n)"
    if not isinstance(pairs, Tensor):
        raise expected("pairs", wanted, type(pairs).__name__)
    if pairs.ndim != 2 or len(pairs) != 2 or pairs.dtype != torch.int64:
        raise expected("pairs", wanted, f"{pairs.dtype} of shape {tuple(pairs.shape)}")
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= size):
        raise expected("pairs", f"numbers of the {size} samples", f"{int(pairs.min())} to {int(pairs.max())}")
    return pairs


def _sorted_sum(values: Tensor) -> Tensor:
    """Return Σ_{k<l} |v_k − v_l| summed over the columns of values (H, h).

    A value appears with + for each smaller one and with − for each greater one.
    """
    columns = values.mT.contiguous()
    order = columns.detach().sort(dim=1).values
    smaller = torch.searchsorted(order, columns.detach())
    greater = len(values) - torch.searchsorted(order, columns.detach(), right=True)
    # What all have in common drops out of the sum; it would cost digits.
    return ((smaller - greater) * (columns - columns.detach().mean(1, keepdim=True))).sum()


class _PairwiseDistanceSum(torch.autograd.Function):
    """Σ_{k<l} ‖m_k − m_l‖; the gradient is found on the way, block by block, so that the H² distances are never held."""

    @staticmethod
    def forward(ctx: Any, differences: Tensor) -> Tensor:
        size, width = differences.shape
        total, gradient = differences.new_zeros(()), torch.zeros_like(differences)
        rows = max(1, _BLOCK_ELEMENTS // (size * (width if differences.is_cuda else 1)))
        for start in range(0, size, rows):
            block = differences[start : start + rows].detach().requires_grad_()
            later = differences[start + rows :].detach().requires_grad_()
            with torch.enable_grad():
                within = torch.pdist(block).sum() if len(block) > 1 else block.sum() * 0
                between = torch.cdist(block, later, compute_mode="donot_use_mm_for_euclid_dist").sum()
                pulls = torch.autograd.grad(within + between, (block, later))
            total += (within + between).detach()
            gradient[start : start + rows] += pulls[0]
            gradient[start + rows :] += pulls[1]
        ctx.save_for_backward(differences, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Tensor:
        differences, gradient = ctx.saved_tensors
        return scale * forbid_second_derivative(gradient, differences)
