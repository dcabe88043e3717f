"""Attach to a Trainer."""

from lightning_netsim.callbacks.similarity_monitor import SimilarityMonitor

__all__ = ["SimilarityMonitor"]
