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
from lightning_netsim.measurement.sweep import ChunkName, Swept

#: Features of some samples, and their ids.
Block = tuple[PerSampleJacobian, Tensor]


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
        self.capacity = capacity
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
        """Keep samples with packed features φ, as many as there is room for; `ids` has shape (B,)."""
        room = self.capacity - len(self)
        if not len(ids) or room <= 0:
            return
        if len(ids) > room:
            packed, ids = packed.select(slice(0, room)), ids[:room]
        if self._rows is None:
            self._rows = packed.empty(self.capacity)
        self._rows.write(len(self), packed)
        self._ids.append(ids)

    def add_some(self, packed: PerSampleJacobian, ids: Tensor, wanted: Tensor) -> None:
        """Keep those samples whose ids are among the `wanted`."""
        keep = torch.isin(ids, wanted)
        if bool(keep.any()):
            self.add(packed.select(keep), ids[keep])

    def blocks(self, size: int) -> Iterator[Block]:
        """Yield the features and ids of at most `size` samples at a time, without copying them."""
        if self._rows is None:
            return
        ids = self.ids
        for start in range(0, len(ids), size):
            part = slice(start, min(start + size, len(ids)))
            yield self._rows.select(part), ids[part]


class SweptSet:
    """One of the two sets, as far as this process has its part of it.

    Args:
        source: the samples.
        budget: bytes; see `SampleTable`.
        render: likewise.
        capacity: how many of the samples are kept with their exact features.

    Attributes:
        source: the samples.
        table: what is known of them.
        store: the exact features of some or all of them.
        normalizations: those of the chunks so far.
        sketches: the sketches of the valid samples, with their ids.
        activations: the activations of all samples, with their ids.
    """

    def __init__(
        self, source: SampleSource, budget: float, render: Callable[[Any], Any] | None = None, capacity: int = 0
    ) -> None:
        self.source = source
        self.table = SampleTable(budget, render)
        self.store = FeatureStore(capacity)
        self.normalizations: dict[ChunkName, Normalization] = {}
        self.sketches: list[tuple[Tensor, Tensor]] = []
        self.activations: list[tuple[DenseFeatureBatch, Tensor]] = []

    def add(self, swept: Swept, packed: PerSampleJacobian | None, sketches: Tensor) -> None:
        """Take in a chunk.

        Args:
            swept: the chunk.
            packed: the packed features of its valid samples; None where they are not kept.
            sketches: of the valid samples, shape (V, K).
        """
        self.table.add(swept.chunk, swept.read, swept.features)
        self.normalizations[swept.name] = swept.features.normalization
        self.sketches.append((sketches, swept.valid_ids))
        if packed is not None:
            self.store.add(packed, swept.valid_ids)
        if swept.activations is not None:
            self.activations.append((swept.activations, swept.chunk.index))

    def hand_over_store(self) -> FeatureStore:
        """Return the store and let go of it, so that its memory is free when the caller has done with it."""
        store, self.store = self.store, FeatureStore(0)
        return store

    @property
    def ids(self) -> Tensor:
        """Return the ids of the valid samples in their order."""
        return joined_ids(self.sketches)

    def vectors(self, width: int, device: torch.device) -> Tensor:
        """Return the sketches of the valid samples, shape (V, K)."""
        return torch.cat([torch.zeros(0, width, device=device), *(vectors for vectors, _ in self.sketches)])


def joined_ids(pairs: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """Return the ids of pairs (values, ids), joined."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(ids for _, ids in pairs)])
