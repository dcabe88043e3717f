"""Judge embeddings by the labels of what is retrieved: whether neighbors are of the class of the query."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_positive_int, check_positive_number, check_tensor, expected


def recall_at_k(matches: Tensor, k: int) -> Tensor:
    """Compute the share of queries with at least one neighbor of their own class among the first k.

    Args:
        matches: shape (Q, K), bool, whether the class of the i-th nearest neighbor is that of the query.
        k: in [1, K].

    Returns:
        A scalar in [0, 1]; NaN without queries.

    Raises:
        NetsimError: `matches` is no boolean matrix, or has fewer than k columns.

    Source: Jégou et al., IEEE PAMI 2011, as used in deep metric learning since Song et al., CVPR 2016.

    Example:
        >>> matches = torch.tensor([[False, True], [False, False]])
        >>> recall_at_k(matches, 1), recall_at_k(matches, 2)
        (tensor(0.), tensor(0.5000))
    """
    matches = _check_matches(matches)
    if check_positive_int("k", k) > matches.shape[1]:
        raise expected("k", f"at most {matches.shape[1]}, the number of neighbors", str(k))
    return matches[:, :k].any(1).float().mean()


def mean_average_precision_at_r(matches: Tensor, num_relevant: Tensor) -> Tensor:
    """Compute MAP@R: (1/R) Σ_{i ≤ R} P(i) [neighbor i matches], averaged over queries, with P(i) the precision at i.

    R is the number of samples of the class of the query that could be found. It is 1 only where these come first.

    Args:
        matches: shape (Q, K), bool, K at least the largest R.
        num_relevant: R of each query, shape (Q,), int64; queries with R = 0 are left out.

    Returns:
        A scalar in [0, 1]; NaN without queries.

    Raises:
        NetsimError: shapes do not fit.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020.

    Example:
        >>> mean_average_precision_at_r(torch.tensor([[True, False, True]]), torch.tensor([2]))
        tensor(0.5000)
    """
    matches = _check_matches(matches)
    num_relevant = torch.as_tensor(num_relevant)
    if num_relevant.shape != matches.shape[:1] or (len(matches) and int(num_relevant.max()) > matches.shape[1]):
        raise expected("num_relevant", f"at most {matches.shape[1]} for each of {len(matches)} queries", repr(num_relevant))
    place = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    counted = matches & (place <= num_relevant.unsqueeze(1))
    precision = counted.cumsum(1) / place
    kept = num_relevant > 0
    return ((precision * counted).sum(1)[kept] / num_relevant[kept]).mean()


def neighbor_vote(similarity: Tensor, neighbor_labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Predict the class for which the neighbors vote, each with the weight exp(similarity / temperature).

    Args:
        similarity: shape (Q, k), descending; NaN for a neighbor that is missing.
        neighbor_labels: shape (Q, k), int64, the class of each neighbor.
        temperature: > 0; a high one makes all votes alike.

    Returns:
        The predicted classes, shape (Q,); of classes with equal votes, that of the nearer neighbor.

    Raises:
        NetsimError: shapes do not fit, or the temperature is not positive.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018.

    Example:
        >>> neighbor_vote(torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([[1, 0, 0]]))
        tensor([1])
    """
    check_tensor("similarity", similarity, 2, like="(Q, k)")
    check_positive_number("temperature", temperature)
    labels = torch.as_tensor(neighbor_labels)
    if labels.shape != similarity.shape or not similarity.shape[1] or labels.is_floating_point():
        raise expected(
            "neighbor_labels", f"whole numbers of shape {tuple(similarity.shape)}", f"{labels.dtype} {tuple(labels.shape)}"
        )
    scores = (similarity / temperature).nan_to_num(-torch.inf)
    # From the highest similarity of a query down, so that no weight overflows and not all vanish.
    weights = (scores - scores.amax(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)).exp()
    # What each neighbor's class gets, among the neighbors: there may be very many classes.
    votes = ((labels.unsqueeze(2) == labels.unsqueeze(1)) * weights.unsqueeze(1)).sum(2)
    return labels.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)


def _check_matches(matches: Tensor) -> Tensor:
    if not isinstance(matches, Tensor) or matches.ndim != 2 or matches.dtype != torch.bool:
        got = f"{matches.dtype} of shape {tuple(matches.shape)}" if isinstance(matches, Tensor) else type(matches).__name__
        raise expected("matches", "a boolean tensor of shape (Q, K)", got)
    return matches
