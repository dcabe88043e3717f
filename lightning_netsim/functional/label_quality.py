"""How well a label agrees with those of the kernel neighbors of its sample, and with what the network says.

Source: a network averages the labels of the neighbors that it sees (Charpiat et al., NeurIPS 2019, section 5), so that a label
that disagrees with them is suspect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, check_tensor, expected
from lightning_netsim.functional._precision import upcast


def neighbor_label_shares(labels: Tensor, similarity: Tensor, num_classes: int) -> Tensor:
    """Compute the share of each class among the neighbors of every query, weighted by their similarity.

    s_ic = (Σ_j w_ij [y_j = c] + 1/C) / (Σ_j w_ij + 1) with w = max(k, 0): one neighbor more, that is of every class alike,
    makes no share zero, and tells many neighbors from few.

    Args:
        labels: shape (Q, k), int64, the class of each neighbor, 0 to C − 1; −1 where there is no neighbor, or no label.
        similarity: shape (Q, k), k(x_i, x_j) in [−1, 1]; what stands where there is no neighbor is ignored.
        num_classes: C.

    Returns:
        Shape (Q, C), in (0, 1); rows sum to one.

    Raises:
        NetsimError: the shapes do not fit, or a label is out of range.

    Example:
        >>> neighbor_label_shares(torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, 1.0, 1.0]]), 2).tolist()
        [[0.625, 0.375]]
    """
    similarity = upcast(check_tensor("similarity", similarity, 2, like="(Q, k)"))
    check_positive_int("num_classes", num_classes)
    if labels.shape != similarity.shape or labels.is_floating_point():
        wanted = f"an int64 tensor of shape {tuple(similarity.shape)}"
        raise expected("labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise expected("labels", f"within -1 to {num_classes - 1}", f"{int(labels.min())} to {int(labels.max())}")
    weight = torch.where(labels >= 0, similarity.nan_to_num(0.0).clamp_min(0), 0.0)
    votes = similarity.new_zeros(len(labels), num_classes).scatter_add_(1, labels.clamp_min(0), weight)
    return (votes + 1 / num_classes) / (votes.sum(1, keepdim=True) + 1)


def label_quality(labels: Tensor, shares: Tensor, probability: Tensor | None = None) -> Tensor:
    """Compute how much the neighbors of every sample, and the network, agree with its label: √(s_iy p_iy).

    Args:
        labels: shape (Q,), int64, the given classes y.
        shares: shape (Q, C), from `neighbor_label_shares`.
        probability: shape (Q,), p_iy, the probability that the network gives to the label; None takes s_iy alone.

    Returns:
        Shape (Q,), in [0, 1]; low is suspect.

    Raises:
        NetsimError: the shapes do not fit.

    Example:
        >>> label_quality(torch.tensor([1]), torch.tensor([[0.75, 0.25]]), torch.tensor([0.25])).tolist()
        [0.25]
    """
    shares = upcast(check_tensor("shares", shares, 2, like="(Q, C)"))
    if labels.shape != shares.shape[:1] or labels.is_floating_point():
        wanted = f"an int64 tensor of shape ({len(shares)},)"
        raise expected("labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
    own = shares.gather(1, labels.unsqueeze(1)).squeeze(1)
    if probability is None:
        return own
    if probability.shape != own.shape:
        raise expected("probability", f"of shape ({len(own)},)", f"shape {tuple(probability.shape)}")
    return (own * probability.to(own).clamp_min(0)).sqrt()
