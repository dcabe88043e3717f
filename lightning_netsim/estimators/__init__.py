"""State over batches of features: update with the reference set, ask for the query set, compute a record."""

from lightning_netsim.estimators.class_similarity import ClassSimilarity
from lightning_netsim.estimators.denoising import LabelDenoising
from lightning_netsim.estimators.embedding_metrics import EmbeddingMetrics
from lightning_netsim.estimators.kernel_neighbors import KernelNeighbors
from lightning_netsim.estimators.linear_probe import LinearProbe
from lightning_netsim.estimators.neighbor_count import NeighborCount
from lightning_netsim.estimators.neighbor_table import NeighborTable
from lightning_netsim.estimators.pseudo_labels import PseudoLabels
from lightning_netsim.estimators.sliced_wasserstein import SlicedWassersteinDistance

__all__ = [
    "ClassSimilarity",
    "EmbeddingMetrics",
    "KernelNeighbors",
    "LabelDenoising",
    "LinearProbe",
    "NeighborCount",
    "NeighborTable",
    "PseudoLabels",
    "SlicedWassersteinDistance",
]
