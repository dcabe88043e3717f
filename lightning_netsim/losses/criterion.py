"""What all criteria share: they know the class and the arguments that they were made with."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_embeddings, check_labels, check_seed, expected
from lightning_netsim.functional._precision import full_precision, upcast


def public_path(kind: type) -> str:
    """Return the path that names a class in checkpoints and files: of a class that this package shows, the shortest.

    Example:
        >>> from lightning_netsim.losses import MMDLoss
        >>> MMDLoss.__module__, public_path(MMDLoss)
        ('lightning_netsim.losses.mmd', 'lightning_netsim.losses.MMDLoss')
    """
    module, name = kind.__module__, kind.__qualname__
    package, *rooms = module.split(".")
    if package == __name__.partition(".")[0]:
        for room in accumulate(rooms, "{}.{}".format, initial=package):
            if getattr(sys.modules.get(room), name, None) is kind:
                return f"{room}.{name}"
    return f"{module}.{name}"


class AbstractCriterion(nn.Module, ABC):
    """A criterion to be minimized.

    A subclass keeps each argument of its constructor as an attribute of the same name: that is what `config` reads.
    """

    def config(self) -> dict[str, Any]:
        """Return the public path of the class, and its arguments as plain values, as LightningCLI reads them."""
        kind = type(self)
        names = () if kind.__init__ is nn.Module.__init__ else inspect.signature(kind).parameters
        for name in names:
            if not hasattr(self, name):
                raise expected(kind.__name__, f"a criterion that keeps its argument `{name}` as an attribute", "none")
        arguments = {name: getattr(self, name) for name in names}
        return {"class_path": public_path(kind), "init_args": arguments}

    def extra_repr(self) -> str:
        values = {name: getattr(self, name, ...) for name in inspect.signature(type(self)).parameters}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not ...)


class Draws:
    """What a criterion draws its random weights from: anew at each call, or always the first time's.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = check_seed("seed", seed)
        self._generator = torch.Generator().manual_seed(seed)

    def generator(self, anew: bool) -> torch.Generator:
        """Return the generator of the next draw, or one that draws as the first."""
        return self._generator if anew else torch.Generator().manual_seed(self.seed)


class AbstractEmbeddingLoss(AbstractCriterion):
    """A criterion of embeddings and their labels, computed in float32 or better, also under autocast."""

    @property
    def num_classes(self) -> int | None:
        """Return how many classes it knows; None where it takes any."""
        return None

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the criterion.

        Args:
            embeddings: shape (B, h).
            labels: shape (B,), the class of each sample; one with a negative label is left out. None takes every sample for
                a class of its own.

        Returns:
            A scalar on the graph; zero where nothing can be compared.

        Raises:
            NetsimError: embeddings are not a finite floating-point matrix, or labels have another length.
        """
        embeddings = upcast(check_embeddings("embeddings", embeddings))
        size = len(embeddings)
        labels = torch.arange(size) if labels is None else check_labels("labels", labels, size)
        labels = labels.to(embeddings.device)
        known = labels >= 0
        if not bool(known.all()):
            embeddings, labels = embeddings[known], labels[known]
        with full_precision(embeddings):
            return self.compute(embeddings, labels)

    @abstractmethod
    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the criterion of samples that all have a label, a scalar on the graph."""
