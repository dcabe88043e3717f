"""Small models and data sets behind the configurations, the README and the examples."""

from __future__ import annotations

from lightning_netsim.demos.classifier import DigitsNetwork, ImageClassifier, MNISTNetwork, SimilarityClassifier
from lightning_netsim.demos.embedding import EmbeddingModule, MetricLearner
from lightning_netsim.demos.images import DigitsDataModule, MNISTDataModule
from lightning_netsim.demos.sinusoid import SinusoidDataModule, SinusoidRegressor, sinusoid

__all__ = [
    "DigitsDataModule",
    "DigitsNetwork",
    "EmbeddingModule",
    "ImageClassifier",
    "MNISTDataModule",
    "MNISTNetwork",
    "MetricLearner",
    "SimilarityClassifier",
    "SinusoidDataModule",
    "SinusoidRegressor",
    "sinusoid",
]
