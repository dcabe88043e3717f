"""Pull embeddings of one class together and push those of different classes apart, by a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_embeddings, check_labels, check_positive_number
from lightning_netsim.functional._precision import upcast


def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Compute the contrastive loss of siamese networks over all pairs of a batch.

    ½ ‖z − z'‖² for a pair of one class, ½ max(0, m − ‖z − z'‖²) for a pair of different classes. The means of both are added,
    each over the pairs whose loss is above zero: negative pairs are soon beyond the margin, and would dilute a mean over all.

    Args:
        embeddings: shape (B, h), not normalized here.
        labels: shape (B,), the class of each sample; one with a negative label is left out.
        margin: m > 0, of the squared distance.

    Returns:
        A scalar, at least 0, in float32 or better; zero, on the graph, where no pair has a loss.

    Raises:
        NetsimError: embeddings are not a finite floating-point matrix, labels have another length, or the margin is not
            positive.

    Source: Lepetit, Deep Learning and Computer Vision (lecture, 2021), embeddings and siamese networks. Hadsell et al., CVPR
    2006, have ½ max(0, m − ‖z − z'‖)² in the place of the second term.

    Example:
        >>> embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
        >>> contrastive_loss(embeddings, torch.tensor([0, 0, 1]))
        tensor(0.8750)
    """
    embeddings = upcast(check_embeddings("embeddings", embeddings))
    margin = check_positive_number("margin", margin)
    size = len(embeddings)
    labels = check_labels("labels", labels, size).to(embeddings.device)
    first, second = torch.triu_indices(size, size, offset=1, device=embeddings.device)
    # Not by products of matrices: the distance of two equal embeddings has to be zero.
    squares = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")[first, second].square()
    known = (labels[first] >= 0) & (labels[second] >= 0)
    same = labels[first] == labels[second]
    total = embeddings.sum() * 0
    for terms in (squares[same & known] / 2, (margin - squares[~same & known]).relu() / 2):
        above = terms[terms > 0]
        total = total + (above.mean() if len(above) else terms.sum() * 0)
    return total
