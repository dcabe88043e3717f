"""Hold on to the weights that an evaluation epoch began with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
