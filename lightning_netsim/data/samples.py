"""Sets of samples from which some can be picked by their position, without going through all of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_netsim._checks import NetsimError, check_positive_int, expected
from lightning_netsim.data.sources import Chunk, from_loader, is_indexed, join_sources

#: (batch, number of its loader) -> the batch where the model can take it.
Move = Callable[[Any, int], Any]

#: Samples that are picked are read, and differentiated, so many at a time.
PICKED_TOGETHER = 32


class Samples:
    """A set of samples, to go through in order or to pick some from by their position.

    Args:
        loader: a DataLoader or an iterable of batches; or a list of DataLoaders, whose positions go on from one to the next.
        move: brings a batch to where the model can take it.
        max_samples: go through a fixed random subset of this many samples of each loader.
        seed: seed of the subset.

    Attributes:
        source: what is gone through.
        dataset: the data set of the first loader; None if it has none.
    """

    def __init__(self, loader: Iterable[Any], move: Move, max_samples: int | None = None, seed: int = 0) -> None:
        if max_samples is not None:
            check_positive_int("max_samples", max_samples)
        several = isinstance(loader, (list, tuple)) and len(loader) > 0 and all(isinstance(one, DataLoader) for one in loader)
        self._loaders: list[Any] = list(loader) if several else [loader]
        self._transfers: list[Callable[[Any, int], Any]] = [
            lambda batch, batch_idx, number=number: move(batch, number)  # type: ignore[misc]
            for number in range(len(self._loaders))
        ]
        pairs = zip(self._loaders, self._transfers, strict=True)
        self.source = join_sources([from_loader(one, transfer, max_samples, seed) for one, transfer in pairs])
        self.dataset = getattr(self._loaders[0], "dataset", None)

    def first(self) -> Chunk:
        """Return a few samples, to look at a model with.

        Raises:
            ValueError: if there are none.
        """
        chunk = next(iter(self.source), None)
        if chunk is None:
            raise expected("loader", "one that gives at least one batch", "none")
        return next(chunk.split(PICKED_TOGETHER))

    def pick(self, positions: Sequence[int]) -> list[Chunk]:
        """Return the samples at `positions`, ascending; with an index, only these are read.

        Raises:
            ValueError: if one is beyond the last sample.
        """
        if not all(is_indexed(loader) for loader in self._loaders):
            return self._pick_from_stream(torch.tensor(positions))
        chunks, offset = [], 0
        for number, (loader, transfer) in enumerate(zip(self._loaders, self._transfers, strict=True)):
            size = len(loader.dataset)
            own = [position - offset for position in positions if offset <= position < offset + size]
            part = DataLoader(Subset(loader.dataset, own), batch_size=PICKED_TOGETHER, collate_fn=loader.collate_fn)
            for chunk in from_loader(part, transfer):
                chunks.append(Chunk(chunk.batch, torch.tensor(own)[chunk.index] + offset, chunk.batch_idx, number))
            offset += size
        return chunks

    def _pick_from_stream(self, positions: Tensor) -> list[Chunk]:
        chunks, size = [], 0
        for chunk in self.source:
            size = max(size, int(chunk.index.max()) + 1)
            keep = torch.isin(chunk.index, positions)
            if bool(keep.any()):
                chunks.append(chunk.pick(keep))
            if sum(len(chunk.index) for chunk in chunks) == len(positions):
                return chunks
        raise _out_of_range("queries", int(positions.max()), size)


def check_positions(name: str, positions: Iterable[int], size: int | None) -> list[int]:
    """Return different positions in a data set of `size` samples, if known, in ascending order.

    Raises:
        ValueError: if there are none, or one is not an int, out of range or there twice.
    """
    found: list[int] = []
    for position in positions:
        if isinstance(position, bool) or not hasattr(position, "__index__"):
            raise expected(name, "positions of samples in the data set, integers from 0", repr(position))
        found.append(operator.index(position))
    if not found:
        raise expected(name, "at least one position of a sample", "none")
    for position in found:
        if position < 0 or (size is not None and position >= size):
            raise _out_of_range(name, position, size)
        if found.count(position) > 1:
            raise expected(name, "different positions", f"{position} more than once")
    return sorted(found)


def _out_of_range(name: str, position: int, size: int | None) -> NetsimError:
    most = "" if size is None else f" to {size - 1:,}"
    return expected(name, f"positions of samples in the data set, from 0{most}", f"{position:,}")
