"""See, and shape, which inputs a network treats as the same thing: similarity by normalized gradients, for Lightning.

The measure is that of Charpiat et al., "Input Similarity from the Neural Network Perspective", NeurIPS 2019.
"""

from __future__ import annotations

__version__ = "0.1.0"

from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis import SimilarityAnalysis, analyze, load_run
from lightning_netsim.batches import SimilarityBatch
from lightning_netsim.callbacks import SimilarityMonitor
from lightning_netsim.denoising import DenoisedLabels, denoise_labels
from lightning_netsim.estimators import EmbeddingMetrics, KernelNeighbors, LabelDenoising, NeighborCount
from lightning_netsim.features import ActivationFeatures, GradientFeatures
from lightning_netsim.functional import kernel_neighbors, neighbor_count, pairwise_similarity, transfer
from lightning_netsim.index import NeighborIndex
from lightning_netsim.issues import IssueReport, find_issues
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian, per_sample_jacobian
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin, MMDMixin, SimilarityMixin
from lightning_netsim.queries import NeighborAnswer, find_neighbors
from lightning_netsim.results import KernelNeighborsResult, NeighborCountResult
from lightning_netsim.reviewed_dataset import ReviewedDataset, apply_review
from lightning_netsim.samplers import RareFirstSampler
from lightning_netsim.transfers import TransferAnswer, find_transfer

__all__ = [
    "ActivationFeatures",
    "ContrastiveMixin",
    "DenoisedLabels",
    "DifferenceAlignmentMixin",
    "EmbeddingMetrics",
    "GradientFeatures",
    "IssueReport",
    "JacobianOperator",
    "KernelNeighbors",
    "KernelNeighborsResult",
    "LabelDenoising",
    "MMDMixin",
    "NeighborAnswer",
    "NeighborCount",
    "NeighborCountResult",
    "NeighborIndex",
    "NetsimError",
    "PerSampleJacobian",
    "RareFirstSampler",
    "ReviewedDataset",
    "SimilarityAnalysis",
    "SimilarityBatch",
    "SimilarityMixin",
    "SimilarityMonitor",
    "TransferAnswer",
    "__version__",
    "analyze",
    "apply_review",
    "denoise_labels",
    "find_issues",
    "find_neighbors",
    "find_transfer",
    "kernel_neighbors",
    "load_run",
    "neighbor_count",
    "pairwise_similarity",
    "per_sample_jacobian",
    "transfer",
]
