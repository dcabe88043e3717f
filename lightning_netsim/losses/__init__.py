"""Criteria for training, one module each: what is enforced is computed from the gradients of a batch."""

from lightning_netsim.losses.gradient_batch import GradientBatch
from lightning_netsim.losses.similarity import (
    AbstractSimilarityLoss,
    DensityLoss,
    GroupSimilarityLoss,
    InvarianceLoss,
    MinibatchSimilarityLoss,
    PairSimilarityLoss,
    TangentLoss,
)

__all__ = [
    "AbstractSimilarityLoss",
    "DensityLoss",
    "GradientBatch",
    "GroupSimilarityLoss",
    "InvarianceLoss",
    "MinibatchSimilarityLoss",
    "PairSimilarityLoss",
    "TangentLoss",
]
