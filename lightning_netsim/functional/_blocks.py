"""What the functions of (query, reference) features share: which features fit, and which of their rows are usable."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_same_size, check_tensor


def check_features(query: Tensor, reference: Tensor | None) -> Tensor:
    """Return the reference features (the query itself by default) if the two fit."""
    check_tensor("query", query, 2, like="(Q, K)")
    if reference is None:
        return query
    check_tensor("reference", reference, 2, like="(N, K)")
    check_same_size("reference", reference, "query", query, dim=1)
    return reference


def usable_rows(features: Tensor) -> Tensor:
    """Return for each row whether it is finite and not zero, shape (rows,), bool: the others are left out."""
    return torch.isfinite(features).all(dim=1) & (features != 0).any(dim=1)
