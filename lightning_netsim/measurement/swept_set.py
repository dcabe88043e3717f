"""What the sweeps over a set leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_netsim.data.sources import SampleSource
from lightning_netsim.jacobian import PerSampleJacobian
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch, Normalization
from lightning_netsim.measurement.sample_table import SampleTable


class FeatureStore:
    """Keep the gradient features φ of samples as they come, each parameter in its packed form.

    A layer that applies its weight once keeps (u, δ) instead of their product, so that the features of a sample take far fewer
    than d·P numbers, and inner products cost as much less. Samples that were left out are not kept.

    Args:
        capacity: how many samples there will be at most; room for them is taken at once, when the first come.

    Attributes:
        features: φ of the samples so far; None while there are none.
        ids: their ids, shape (n,), int64.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: PerSampleJacobian | None = None
        self._ids: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    @property
    def ids(self) -> Tensor:
        self._ids = [torch.cat(self._ids)] if self._ids else [torch.zeros(0, dtype=torch.int64)]
        return self._ids[0]

    @property
    def features(self) -> PerSampleJacobian | None:
        return None if self._rows is None else self._rows.select(slice(0, len(self)))

    def add(self, packed: PerSampleJacobian, ids: Tensor) -> None:
        """Keep samples with packed features φ; `ids` has shape (B,)."""
        if not len(ids):
            return
        if self._rows is None:
            self._rows = packed.empty(self._capacity)
        self._rows.write(len(self), packed)
        self._ids.append(ids)

    def blocks(self, size: int) -> Iterator[tuple[PerSampleJacobian, Tensor]]:
        """Yield the features and ids of at most `size` samples at a time, without copying them."""
        if self._rows is None:
            return
        ids = self.ids
        for start in range(0, len(ids), size):
            part = slice(start, min(start + size, len(ids)))
            yield self._rows.select(part), ids[part]


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
