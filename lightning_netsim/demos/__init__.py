"""Small models and data sets behind the configurations, the README and the examples."""

from __future__ import annotations

from lightning_netsim.demos.classifier import DigitsNetwork, ImageClassifier, MNISTNetwork, SimilarityClassifier
from lightning_netsim.demos.domains import DomainClassifier, ShiftedMNISTDataModule
from lightning_netsim.demos.embedding import EmbeddingModule, MetricLearner
from lightning_netsim.demos.images import DigitsDataModule, MNISTDataModule
from lightning_netsim.demos.photographs import PhotographDataModule
from lightning_netsim.demos.sinusoid import SinusoidDataModule, SinusoidRegressor, sinusoid
from lightning_netsim.demos.super_resolution import SuperResolutionNetwork, SuperResolver

__all__ = [
    "DigitsDataModule",
    "DigitsNetwork",
    "DomainClassifier",
    "EmbeddingModule",
    "ImageClassifier",
    "MNISTDataModule",
    "MNISTNetwork",
    "MetricLearner",
    "PhotographDataModule",
    "ShiftedMNISTDataModule",
    "SimilarityClassifier",
    "SinusoidDataModule",
    "SinusoidRegressor",
    "SuperResolutionNetwork",
    "SuperResolver",
    "sinusoid",
]
