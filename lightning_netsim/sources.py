"""Sets of samples that can be gone through more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_netsim.jacobian import trees


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples of a batch.

    Attributes:
        batch: the samples, as the model takes them.
        index: shape (B,), int64, their positions in the data set.
        batch_idx: the number of the batch that they came from.
        dataloader: the number of the loader.
    """

    batch: Any
    index: Tensor
    batch_idx: int = 0
    dataloader: int = 0

    def split(self, size: int) -> Iterator[Chunk]:
        """Return the samples in pieces of at most `size`; whole, if the batch has no first dimension of that many."""
        count = len(self.index)
        if count <= size or trees.batch_size(self.batch) != count:
            yield self
            return
        for start in range(0, count, size):
            part = slice(start, start + size)
            yield Chunk(trees.take(self.batch, part, count), self.index[part], self.batch_idx, self.dataloader)

    def pick(self, keep: Tensor) -> Chunk:
        """Return the samples of this chunk where `keep`, shape (B,), bool, is True."""
        if bool(keep.all()):
            return self
        index = keep.nonzero().squeeze(1)
        return Chunk(trees.take(self.batch, index, len(keep)), self.index[keep], self.batch_idx, self.dataloader)


class SampleSource:
    """A set of samples that gives the same chunks each time it is gone through.

    Args:
        chunks: called for every sweep; returns the batches in order.
        num_samples: how many samples there are, if known.
        positions: their positions in the data set, where these are not 0, 1, 2, ...
    """

    def __init__(
        self, chunks: Callable[[], Iterable[Chunk]], num_samples: int | None = None, positions: Tensor | None = None
    ) -> None:
        self._chunks = chunks
        self.num_samples = num_samples
        self.positions = positions

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks())


def fixed_subset(num_samples: int, max_samples: int | None, seed: int) -> Tensor | None:
    """Return `max_samples` of `num_samples` positions, sorted, the same for the same seed; None for all."""
    if max_samples is None or max_samples >= num_samples:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_samples, generator=generator)[:max_samples].sort().values
