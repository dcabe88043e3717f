"""What a sample, a batch and a label are: reading a batch, sets of samples and their order, the processes that share them."""

from lightning_netsim.data.batches import SimilarityBatch, read_batch

__all__ = ["SimilarityBatch", "read_batch"]
