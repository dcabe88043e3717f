"""What the sweeps over a set leave behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_netsim.features import DenseFeatureBatch, Normalization
from lightning_netsim.sample_table import SampleTable
from lightning_netsim.sources import SampleSource
from lightning_netsim.store import FeatureStore


class SweptSet:
    """One of the two sets, as far as this process has its share of it.

    Attributes:
        source: the samples.
        table: what is known of them.
        known: the normalizations of their chunks.
        store: the exact features of some or all of them.
        sketches: their sketches, with the ids of the valid ones.
        activations: their activations.
    """

    def __init__(self, source: SampleSource, budget: float, render: Callable[[Any], Any] | None) -> None:
        self.source = source
        self.table = SampleTable(budget, render)
        self.known: dict[tuple[int, int], Normalization] = {}
        self.store = FeatureStore(0)
        self.sketches: list[tuple[Tensor, Tensor]] = []
        self.activations: list[tuple[DenseFeatureBatch, Tensor]] = []

    @property
    def ids(self) -> Tensor:
        """Return the ids of the valid samples in their order."""
        return joined_ids(self.sketches)

    def vectors(self, width: int, device: torch.device) -> Tensor:
        """Return the sketches of the valid samples, shape (V, K)."""
        return torch.cat([torch.zeros(0, width, device=device), *(vectors for vectors, _ in self.sketches)])


def joined_ids(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the ids of pairs (values, ids), joined."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(ids for _, ids in pairs)])
