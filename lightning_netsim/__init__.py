"""See, and shape, which inputs a network treats as the same thing: similarity by normalized gradients, for Lightning.

The measure is that of Charpiat et al., "Input Similarity from the Neural Network Perspective", NeurIPS 2019.
"""

from __future__ import annotations

__version__ = "0.1.0"

from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.analyze import SimilarityAnalysis, analyze, load_run
from lightning_netsim.analysis.denoise import DenoisedLabels, denoise_labels
from lightning_netsim.analysis.issues import IssueReport, find_issues
from lightning_netsim.analysis.neighbors import NeighborAnswer, find_neighbors
from lightning_netsim.analysis.rare_first import RareFirstSampler
from lightning_netsim.analysis.reviewed_dataset import ReviewedDataset, apply_review
from lightning_netsim.analysis.transfer import TransferAnswer, find_transfer
from lightning_netsim.callbacks import SimilarityMonitor
from lightning_netsim.data.batches import SimilarityBatch
from lightning_netsim.estimators import EmbeddingMetrics, KernelNeighbors, LabelDenoising, NeighborCount
from lightning_netsim.estimators.index import NeighborIndex
from lightning_netsim.functional import kernel_neighbors, neighbor_count, pairwise_similarity, transfer
from lightning_netsim.functional.results import KernelNeighborsResult, NeighborCountResult
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian, per_sample_jacobian
from lightning_netsim.jacobian.features import ActivationFeatures, GradientFeatures
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin, MMDMixin, SimilarityMixin

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
