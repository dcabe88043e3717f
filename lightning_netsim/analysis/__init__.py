"""Ask about a model and a data set in a script or a notebook: all samples, single ones, labels, issues, a review of them."""

from lightning_netsim.analysis.analyze import SimilarityAnalysis, analyze, load_run
from lightning_netsim.analysis.denoise import DenoisedLabels, denoise_labels
from lightning_netsim.analysis.issues import IssueReport, find_issues
from lightning_netsim.analysis.neighbors import NeighborAnswer, find_neighbors
from lightning_netsim.analysis.rare_first import RareFirstSampler
from lightning_netsim.analysis.review import review
from lightning_netsim.analysis.reviewed_dataset import ReviewedDataset, apply_review
from lightning_netsim.analysis.transfer import TransferAnswer, find_transfer

__all__ = [
    "DenoisedLabels",
    "IssueReport",
    "NeighborAnswer",
    "RareFirstSampler",
    "ReviewedDataset",
    "SimilarityAnalysis",
    "TransferAnswer",
    "analyze",
    "apply_review",
    "denoise_labels",
    "find_issues",
    "find_neighbors",
    "find_transfer",
    "load_run",
    "review",
]
