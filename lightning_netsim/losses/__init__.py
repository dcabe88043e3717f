"""Criteria for training, one module each: of gradients, of embeddings, of two sets of samples, or of pairs of images."""

from lightning_netsim.losses.contrastive import ContrastiveLoss, MetricLearningLoss
from lightning_netsim.losses.criterion import AbstractCriterion, AbstractEmbeddingLoss
from lightning_netsim.losses.difference_alignment import DifferenceAlignmentLoss
from lightning_netsim.losses.gradient_batch import GradientBatch
from lightning_netsim.losses.image import AbstractImageLoss
from lightning_netsim.losses.mmd import MMDLoss
from lightning_netsim.losses.patch_mmd import PatchMMDLoss
from lightning_netsim.losses.random_network import RandomNetworkLoss
from lightning_netsim.losses.similarity import (
    AbstractSimilarityLoss,
    DensityLoss,
    GroupSimilarityLoss,
    InvarianceLoss,
    MinibatchSimilarityLoss,
    PairSimilarityLoss,
    TangentLoss,
)
from lightning_netsim.losses.vgg import VGGLoss

__all__ = [
    "AbstractCriterion",
    "AbstractEmbeddingLoss",
    "AbstractImageLoss",
    "AbstractSimilarityLoss",
    "ContrastiveLoss",
    "DensityLoss",
    "DifferenceAlignmentLoss",
    "GradientBatch",
    "GroupSimilarityLoss",
    "InvarianceLoss",
    "MMDLoss",
    "MetricLearningLoss",
    "MinibatchSimilarityLoss",
    "PairSimilarityLoss",
    "PatchMMDLoss",
    "RandomNetworkLoss",
    "TangentLoss",
    "VGGLoss",
]
