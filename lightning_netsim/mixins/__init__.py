"""Mixins that add a criterion to the training step of any LightningModule."""

from lightning_netsim.mixins.contrastive import ContrastiveMixin
from lightning_netsim.mixins.difference_alignment import DifferenceAlignmentMixin
from lightning_netsim.mixins.mmd import MMDMixin
from lightning_netsim.mixins.similarity import SimilarityMixin

__all__ = ["ContrastiveMixin", "DifferenceAlignmentMixin", "MMDMixin", "SimilarityMixin"]
