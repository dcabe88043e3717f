"""The processes that share one measurement: each takes a part of the samples, all end with the same tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.data import trees

T = TypeVar("T")


class Processes:
    """The processes of the default group of `torch.distributed`, or this one alone where there is none.

    Every method but `alone` is collective: all processes call it, in the same order.

    Attributes:
        rank: the number of this process.
        size: W, how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def current(cls) -> Processes:
        """Return the processes of the default group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def alone(self) -> bool:
        """Return whether there is only this process."""
        return self.size == 1

    def gather(self, value: T) -> list[T]:
        """Return what each process passes, in their order."""
        if self.alone:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, trees.detached(value, torch.device("cpu")))
        return gathered

    def broadcast(self, value: T) -> T:
        """Return what the first process passes."""
        if self.alone:
            return value
        boxed = [value]
        dist.broadcast_object_list(boxed, src=0)
        return boxed[0]

    def concatenate(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, joined along dimension 0, where this one's is."""
        return tensor if self.alone else torch.cat(self.gather(tensor)).to(tensor.device)

    def sum(self, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
        """Return the sum of every tensor over the processes, also of those that only some of them have.

        Args:
            tensors: by name.
            device: where this process keeps such tensors, if it may have none.
        """
        if self.alone:
            return dict(tensors)
        known: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for held in self.gather({name: (value.shape, value.dtype) for name, value in tensors.items()}):
            known |= held
        device = next((value.device for value in tensors.values()), device or torch.device("cpu"))
        total = {}
        for name, (shape, dtype) in sorted(known.items()):
            total[name] = tensors[name].clone() if name in tensors else torch.zeros(shape, dtype=dtype, device=device)
            dist.all_reduce(total[name])
        return total

    def interleave(self, values: Iterable[T]) -> Iterator[T]:
        """Yield the values of all processes to all of them: the first of each, then the second of each, ..."""
        if self.alone:
            yield from values
            return
        remaining = iter(values)
        while True:
            gathered = self.gather(list(islice(remaining, 1)))
            if not any(gathered):
                return
            for held in gathered:
                yield from held

    def check_agreement(self, name: str, value: Any) -> None:
        """Raise in every process if they disagree.

        Raises:
            ValueError: naming what they hold.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            got = ", ".join(f"{other} in process {rank}" for rank, other in enumerate(values))
            remedy = "Let every process make the same data set in the same order: use the same files and seeds."
            raise expected(name, "the same in every process", got, remedy)
