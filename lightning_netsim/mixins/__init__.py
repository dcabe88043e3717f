"""Mixins that add a criterion to the training step of any LightningModule."""

from lightning_netsim.mixins.similarity import SimilarityMixin

__all__ = ["SimilarityMixin"]
