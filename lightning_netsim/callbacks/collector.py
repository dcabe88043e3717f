"""Collect the samples of a validation epoch as it goes by, so that they can be gone through again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_netsim._checks import expected
from lightning_netsim.data import trees
from lightning_netsim.data.sources import (
    Chunk,
    SampleSource,
    from_loader,
    is_indexed,
    is_sequential,
    join_sources,
)


class Collector:
    """Keep the batches of an evaluation epoch on the CPU, or know how to read them again.

    A kept batch is the very batch that the step saw, augmentation included, and costs no second reading. Where the loader is
    shuffled, or the batches outgrow the budget, the data set is read again in order.

    Args:
        trainer: the trainer, in an evaluation loop.
        loaders: the loaders of the loop.
        num_batches: how many batches the loop takes of each; infinite if unknown.
        max_samples: measure a fixed random subset of this size of each loader.
        budget: bytes that kept batches may take.
        seed: seed of the subset.
    """

    def __init__(
        self,
        trainer: Trainer,
        loaders: Sequence[Any],
        num_batches: Sequence[int | float],
        max_samples: int | None,
        budget: float,
        seed: int,
    ) -> None:
        self._num_batches = [None if size == float("inf") else int(size) for size in num_batches]
        # How each loader is read again; a stream is gone through once, and its batches have to be kept.
        self._read_again = {
            number: from_loader(loader, transfer(trainer, number), max_samples, seed, _in_all_processes(loader, limit))
            for number, (loader, limit) in enumerate(zip(loaders, self._num_batches, strict=True))
            if is_indexed(loader)
        }
        self._max_samples = max_samples
        self._room = budget
        self._can_read_again = len(self._read_again) == len(loaders)
        # Several processes each see their own part: one of them reads the whole set.
        self._keeps = trainer.world_size == 1 and all(is_sequential(loader) or not is_indexed(loader) for loader in loaders)
        self._kept: list[list[Chunk]] = [[] for _ in loaders]
        self._seen = [0] * len(loaders)

    @property
    def num_samples(self) -> int | None:
        """Return how many samples are measured; None where a data set has no length."""
        return join_sources(list(self._read_again.values())).num_samples if self._can_read_again else None

    @property
    def length_is_known(self) -> bool:
        """Return whether the number of batches of every loader is known before they are gone through."""
        return None not in self._num_batches

    def is_last(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Return whether no batch follows this one."""
        later = self._num_batches[dataloader_idx + 1 :]
        return batch_idx + 1 == self._num_batches[dataloader_idx] and not any(later)

    def add(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Keep a copy of a batch, as long as the budget lasts."""
        size = trees.batch_size(batch) or 1
        start = self._seen[dataloader_idx]
        self._seen[dataloader_idx] += size
        if not self._keeps:
            return
        index = torch.arange(start, start + size)
        chunk = Chunk(batch, index, batch_idx, dataloader_idx)
        again = self._read_again.get(dataloader_idx)
        subset = None if again is None else again.positions
        wanted = torch.isin(index, subset) if subset is not None else index < (self._max_samples or start + size)
        if not bool(wanted.any()):
            return
        chunk = chunk.pick(wanted)
        kept = trees.detached(chunk.batch, torch.device("cpu"))
        self._room -= sum(tensor.nbytes for tensor in trees.tensors(kept))
        if self._room >= 0:
            self._kept[dataloader_idx].append(Chunk(kept, chunk.index, batch_idx, dataloader_idx))
            return
        self._keeps = False
        self._kept = [[] for _ in self._seen]
        if not self._can_read_again:
            raise expected(
                "memory_budget",
                "enough to keep the validation batches of a loader that cannot be read again in order",
                "less than they take",
                "Choose a larger `memory_budget` or a smaller `max_samples`.",
            )

    def source(self, pl_module: LightningModule) -> SampleSource:
        """Return the samples of the epoch."""
        if not self._keeps:
            return join_sources(list(self._read_again.values()))
        return join_sources([_kept_source(*pair, pl_module.device) for pair in zip(self._kept, self._seen, strict=True)])


def _kept_source(kept: list[Chunk], seen: int, device: torch.device) -> SampleSource:
    """Return the batches that were kept of one loader, of which so many samples were seen."""
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *(chunk.index for chunk in kept)])
    return SampleSource(
        lambda: (replace(chunk, batch=trees.moved(chunk.batch, device)) for chunk in kept),
        len(index),
        None if len(index) == seen else index,
        extent=seen,
    )


def _in_all_processes(loader: Any, num_batches: int | None) -> int | None:
    """Return how many batches of a loader all processes together take, where each takes `num_batches`; None if unknown."""
    return None if num_batches is None else num_batches * getattr(getattr(loader, "sampler", None), "num_replicas", 1)


def transfer(trainer: Trainer, dataloader_idx: int = 0) -> Callable[[Any, int], Any]:
    """Return the function that brings a batch of a loader to where the trainer's model takes it, hooks included."""

    def move(batch: Any, batch_idx: int) -> Any:
        converted = trainer.precision_plugin.convert_input(batch)
        converted = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(converted, dataloader_idx=dataloader_idx)

    return move


class WeightSnapshot:
    """The parameters and buffers of a model at one moment; they can be put in place again for a while.

    An averaged model's weights may be swapped out between the last batch and the end of the epoch. Where the last batch is not
    known to be the last, the measurement comes after it, and needs the weights that the epoch saw.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        with torch.inference_mode(False):
            tensors = [*model.parameters(), *model.buffers()]
            self._saved: list[tuple[Tensor, Tensor]] = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the saved weights in place for the time of the block; tensors keep their identity and their gradients."""
        changed = [(tensor, saved) for tensor, saved in self._saved if not torch.equal(tensor, saved)]
        current = [tensor.data for tensor, _ in changed]
        for tensor, saved in changed:
            tensor.data = saved
        try:
            yield
        finally:
            for (tensor, _), data in zip(changed, current, strict=True):
                tensor.data = data
