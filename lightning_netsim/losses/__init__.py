"""Criteria for training, one module each: of the gradients of a batch, or of its embeddings."""

from lightning_netsim.losses.contrastive import ContrastiveLoss, MetricLearningLoss
from lightning_netsim.losses.criterion import AbstractCriterion, AbstractEmbeddingLoss
from lightning_netsim.losses.difference_alignment import DifferenceAlignmentLoss
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
    "AbstractCriterion",
    "AbstractEmbeddingLoss",
    "AbstractSimilarityLoss",
    "ContrastiveLoss",
    "DensityLoss",
    "DifferenceAlignmentLoss",
    "GradientBatch",
    "GroupSimilarityLoss",
    "InvarianceLoss",
    "MetricLearningLoss",
    "MinibatchSimilarityLoss",
    "PairSimilarityLoss",
    "TangentLoss",
]
