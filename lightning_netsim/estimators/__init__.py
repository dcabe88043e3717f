"""State over batches of features: update with the reference set, ask for the query set, compute a record."""

from lightning_netsim.estimators.all_pairs import AllPairs
from lightning_netsim.estimators.kernel_neighbors import KernelNeighbors
from lightning_netsim.estimators.neighbor_count import NeighborCount
from lightning_netsim.estimators.neighbor_table import NeighborTable
from lightning_netsim.estimators.recall_audit import RecallAudit
from lightning_netsim.estimators.reranking import Reranking, shortlist_size

__all__ = ["AllPairs", "KernelNeighbors", "NeighborCount", "NeighborTable", "RecallAudit", "Reranking", "shortlist_size"]
