"""Sets of samples that can be gone through more than once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_netsim._checks import expected
from lightning_netsim.data import trees


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
        extent: how many positions the data set has, if known; `num_samples` by default.
        split: (rank, size) -> the part of this set that one of `size` processes takes, in the same batches; None if it cannot
            be divided.
    """

    def __init__(
        self,
        chunks: Callable[[], Iterable[Chunk]],
        num_samples: int | None = None,
        positions: Tensor | None = None,
        extent: int | None = None,
        split: Callable[[int, int], SampleSource] | None = None,
    ) -> None:
        self._chunks = chunks
        self._split = split
        self.num_samples = num_samples
        self.positions = positions
        self.extent = num_samples if extent is None else extent

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks())

    def split(self, rank: int, size: int) -> SampleSource:
        """Return the part of this set that process `rank` of `size` takes: whole batches, as many as any other process.

        Raises:
            ValueError: if there are several processes and the set cannot be divided.
        """
        if size == 1:
            return self
        if self._split is None:
            wanted = "a DataLoader of a data set with an index and a length, since several processes share it"
            raise expected("loader", wanted, "one without", "Use a single device.")
        return self._split(rank, size)


def fixed_subset(num_samples: int, max_samples: int | None, seed: int) -> Tensor | None:
    """Return `max_samples` of `num_samples` positions, sorted, the same for the same seed; None for all."""
    if max_samples is None or max_samples >= num_samples:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_samples, generator=generator)[:max_samples].sort().values


def is_sequential(loader: Any) -> bool:
    """Return whether the n-th sample that `loader` gives is sample n of its data set."""
    if not is_indexed(loader) or type(loader.batch_sampler) is not BatchSampler:
        return False
    # A batch sampler given by the user has its own sampler, which the loader's `sampler` does not show.
    return isinstance(loader.batch_sampler.sampler, SequentialSampler)


def is_indexed(loader: Any) -> bool:
    """Return whether `loader` draws from a data set with an index, so that it can be gone through in order."""
    # Without a batch sampler, an entry of the data set is a whole batch.
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return False
    return not isinstance(loader.dataset, IterableDataset) and isinstance(loader.dataset, Sized)


def from_loader(
    loader: Iterable[Any],
    transfer: Callable[[Any, int], Any],
    max_samples: int | None = None,
    seed: int = 0,
    limit_batches: int | None = None,
) -> SampleSource:
    """Return a source over a data loader, in the order of its data set and without touching the loader itself.

    A shuffled loader is rebuilt in order. One without an index (an iterable data set, a list of batches) is iterated as it is,
    and a sample's identity is then its position.

    Args:
        loader: the loader.
        transfer: (batch, number of the batch) -> the batch where the model can take it.
        max_samples: use a fixed random subset of this size; of a loader without an index, the first samples.
        seed: seed of the subset.
        limit_batches: use no more than the first batches of the loader.
    """
    if not is_indexed(loader):
        return from_batches(loader, transfer, max_samples, limit_batches)
    if not isinstance(loader, DataLoader):
        raise expected("loader", "a DataLoader", type(loader).__name__)
    dataset: Any = loader.dataset
    extent = len(dataset)
    size = int(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1)
    total = extent if limit_batches is None else min(extent, limit_batches * size)
    chosen = fixed_subset(total, max_samples, seed)
    positions = torch.arange(total) if chosen is None else chosen
    return _indexed(loader, transfer, positions, range(math.ceil(len(positions) / size)), size, extent)


def _indexed(
    loader: DataLoader[Any],
    transfer: Callable[[Any, int], Any],
    positions: Tensor,
    batches: range,
    size: int,
    extent: int,
) -> SampleSource:
    """Return a source of some of the batches, each of `size` samples, into which `positions` fall."""
    own = positions[batches.start * size : batches.stop * size]

    def chunks() -> Iterator[Chunk]:
        parts = torch.split(own, size) if len(own) else ()
        for index, batch_idx, batch in zip(parts, batches, _in_order(loader, own, size), strict=True):
            yield Chunk(transfer(batch, batch_idx), index, batch_idx)

    def split(rank: int, processes: int) -> SampleSource:
        start, stop = (len(batches) * part // processes for part in (rank, rank + 1))
        return _indexed(loader, transfer, positions, batches[start:stop], size, extent)

    whole = len(own) == extent
    return SampleSource(chunks, len(own), None if whole else own, extent, split)


def from_batches(
    batches: Iterable[Any],
    transfer: Callable[[Any, int], Any] | None = None,
    max_samples: int | None = None,
    limit_batches: int | None = None,
) -> SampleSource:
    """Return a source over batches that give the same samples whenever they are iterated; they are numbered as they come.

    Args:
        batches: the batches.
        transfer: (batch, number of the batch) -> the batch where the model can take it.
        max_samples: use no more than the first samples.
        limit_batches: use no more than the first batches.
    """
    if isinstance(batches, Iterator):
        remedy = "Pass a DataLoader, or a list of the batches."
        raise expected("loader", "one that can be gone through again", f"a spent-once {type(batches).__name__}", remedy)
    limit = float("inf") if max_samples is None else max_samples

    def chunks() -> Iterator[Chunk]:
        start = 0
        for batch_idx, batch in enumerate(batches):
            if start >= limit or batch_idx == limit_batches:
                return
            moved = batch if transfer is None else transfer(batch, batch_idx)
            chunk = Chunk(moved, torch.arange(start, start + (trees.batch_size(moved) or 1)), batch_idx)
            start += len(chunk.index)
            yield chunk.pick(chunk.index < limit)

    if not isinstance(batches, Sequence):
        return SampleSource(chunks)
    total = sum(trees.batch_size(batch) or 1 for batch in batches[:limit_batches])
    return SampleSource(chunks, total if max_samples is None else min(total, max_samples), extent=total)


def join_sources(sources: list[SampleSource]) -> SampleSource:
    """Return the samples of several loaders as one set; positions go on from one loader to the next."""
    if len(sources) == 1:
        return sources[0]

    def chunks() -> Iterator[Chunk]:
        offset = 0
        for number, source in enumerate(sources):
            last = -1
            for chunk in source:
                last = max(last, int(chunk.index.max()))
                yield Chunk(chunk.batch, chunk.index + offset, chunk.batch_idx, number)
            offset += last + 1 if source.extent is None else source.extent

    sizes = [source.num_samples for source in sources if source.num_samples is not None]
    extents = [source.extent for source in sources if source.extent is not None]
    if len(sizes) < len(sources) or len(extents) < len(sources):
        return SampleSource(chunks)
    offsets = [sum(extents[:number]) for number in range(len(sources))]
    positions = [
        (torch.arange(size) if source.positions is None else source.positions) + offset
        for source, size, offset in zip(sources, sizes, offsets, strict=True)
    ]

    def split(rank: int, size: int) -> SampleSource:
        return join_sources([source.split(rank, size) for source in sources])

    return SampleSource(chunks, sum(sizes), torch.cat(positions), sum(extents), split)


def _in_order(loader: DataLoader[Any], positions: Tensor, batch_size: int) -> DataLoader[Any]:
    """Return a loader of the same data set that gives the samples at `positions`, in that order."""
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=positions.tolist(),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(0),
    )
