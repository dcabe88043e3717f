"""How well the label of a sample agrees with those of its kernel neighbors, and with what the network says of it.

A network averages the labels of the neighbors that it sees (Charpiat et al., NeurIPS 2019, section 5), so that a label which
disagrees with them is suspect. Of many scores, this one found planted errors best: `experiments/label_noise.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, expected

#: The vote of the network itself, at full margin, beside that of all neighbors together. A larger one finds fewer errors where
#: the network has learned them by heart.
OWN_VOTE = 1 / 4


def rank_weights(present: Tensor) -> Tensor:
    """Return the weight of each neighbor, 1/√rank, of those that are present; rows sum to one, or are zero.

    Args:
        present: shape (Q, k), bool, nearest first.
    """
    weight = torch.arange(1, present.shape[1] + 1, dtype=torch.float64, device=present.device).rsqrt() * present
    return weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def label_votes(
    neighbor_labels: Tensor, num_classes: int, predictions: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    """Count the votes of the neighbors of every sample, and of the network, for each class.

    V_c = (Σ_r w_r [l_r = c] + ¼ m [c = prediction]) / (1 + ¼), with w_r ∝ 1/√r, Σ w_r = 1; without predictions the first term.

    Args:
        neighbor_labels: shape (Q, k), int64, the class l_r of the neighbor of rank r, 0 to C − 1, nearest first; −1 where there
            is none.
        num_classes: C.
        predictions: shape (Q,), int64, what the network takes each sample for; −1 where that is no class.
        margin: shape (Q,), m in [0, 1], the difference of its two largest probabilities.

    Returns:
        Shape (Q, C), in [0, 1].

    Raises:
        NetsimError: a shape does not fit, or a label is out of range.

    Example:
        >>> label_votes(torch.tensor([[0, 1]]), 2, torch.tensor([0]), torch.tensor([1.0]))
        tensor([[0.6686, 0.3314]], dtype=torch.float64)
    """
    check_positive_int("num_classes", num_classes)
    if neighbor_labels.ndim != 2:
        raise expected("neighbor_labels", "of shape (Q, k)", f"shape {tuple(neighbor_labels.shape)}")
    _check_classes("neighbor_labels", neighbor_labels, num_classes)
    weight = rank_weights(neighbor_labels >= 0)
    votes = weight.new_zeros(len(weight), num_classes).scatter_add_(1, neighbor_labels.clamp_min(0), weight)
    if predictions is None or margin is None:
        return votes
    _check_classes("predictions", predictions, num_classes)
    for name, value in (("predictions", predictions), ("margin", margin)):
        if value.shape != (len(votes),):
            raise expected(name, f"of shape ({len(votes)},)", f"shape {tuple(value.shape)}")
    own = OWN_VOTE * margin.to(votes).nan_to_num(0.0) * (predictions >= 0)
    votes = votes.scatter_add(1, predictions.clamp_min(0).unsqueeze(1), own.unsqueeze(1))
    return votes / (1 + OWN_VOTE)


def label_quality(votes: Tensor, labels: Tensor) -> Tensor:
    """Compute by how much the votes for the given label exceed those for the best other class: ½ + ½ (V_y − max_{c ≠ y} V_c).

    Args:
        votes: shape (Q, C), from `label_votes`.
        labels: shape (Q,), int64, y.

    Returns:
        Shape (Q,), in [0, 1]: below ½ another label has more votes.

    Raises:
        NetsimError: a shape does not fit, or a label is out of range.

    Example:
        >>> label_quality(torch.tensor([[0.75, 0.25]]), torch.tensor([1]))
        tensor([0.2500])
    """
    if votes.ndim != 2 or not votes.is_floating_point():
        raise expected("votes", "a floating-point tensor of shape (Q, C)", f"{votes.dtype} of shape {tuple(votes.shape)}")
    if labels.shape != votes.shape[:1]:
        raise expected("labels", f"of shape ({len(votes)},)", f"shape {tuple(labels.shape)}")
    _check_classes("labels", labels, votes.shape[1], least=0)
    given = labels.unsqueeze(1)
    # A set with one class has no other.
    others = votes.scatter(1, given, 0.0).amax(1)
    return (1 + votes.gather(1, given).squeeze(1) - others) / 2


def _check_classes(name: str, labels: Tensor, num_classes: int, least: int = -1) -> None:
    if labels.is_floating_point() or (labels.numel() and not least <= int(labels.min()) <= int(labels.max()) < num_classes):
        got = f"{labels.dtype}" if labels.is_floating_point() else f"{int(labels.min())} to {int(labels.max())}"
        raise expected(name, f"integers within {least} to {num_classes - 1}", got)
