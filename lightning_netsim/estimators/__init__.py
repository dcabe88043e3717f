"""State over batches of features: update with the reference set, ask for the query set, compute a record."""

from lightning_netsim.estimators.kernel_neighbors import KernelNeighbors
from lightning_netsim.estimators.neighbor_count import NeighborCount
from lightning_netsim.estimators.recall_audit import RecallAudit

__all__ = ["KernelNeighbors", "NeighborCount", "RecallAudit"]
