"""Take what a layer puts out while the training step runs: the rows that a term of embeddings or of features is computed of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_netsim._checks import check_layer, expected
from lightning_netsim.data.batches import find_outputs
from lightning_netsim.mixins.regularized import AbstractRegularizer, RegularizedModule, Term
from lightning_netsim.mixins.schedule import ScheduleLike


class AbstractLayerRegularizer(AbstractRegularizer):
    """A term of what a layer puts out during the training step, by the `<name>_criterion` that the module has at the time.

    Args:
        name: the prefix of its settings.
        weight: of the term.
        every_n_steps: how often it is added.
        layer: the module whose output is taken; None for what the LightningModule returns.
    """

    def __init__(self, name: str, weight: ScheduleLike, every_n_steps: int, layer: str | None) -> None:
        super().__init__(name, weight, every_n_steps)
        if layer is not None and not isinstance(layer, str):
            raise expected(f"{name}_layer", "the name of a module", repr(layer))
        self._layer = layer

    def prepare(self, module: LightningModule) -> None:
        self._source(module)

    @contextmanager
    def watch(self, module: RegularizedModule, batch: Any, batch_idx: int) -> Iterator[Term]:
        with self.capturing(module, lambda: module._is_watched) as seen:
            yield lambda: self._checked(self.term(module, batch, seen))

    @contextmanager
    def capturing(self, module: LightningModule, is_wanted: Callable[[], bool]) -> Iterator[list[Tensor]]:
        """Collect the rows of each call of the layer inside the block, where they are wanted."""
        seen: list[Tensor] = []

        def hook(part: nn.Module, args: Any, output: Any) -> None:
            # A pass without a graph, as of a teacher, is not what is trained.
            if is_wanted() and torch.is_grad_enabled():
                seen.append(self._rows(output).clone())  # What follows may change the output in place.

        handle = self._source(module).register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    @abstractmethod
    def term(self, module: RegularizedModule, batch: Any, seen: list[Tensor]) -> Tensor:
        """Return the term, a scalar, of the rows of each call of the layer."""

    def joined(self, seen: list[Tensor]) -> Tensor:
        """Return the rows of all calls, of the first call first."""
        if not seen:
            where = "the LightningModule itself" if self._layer is None else repr(self._layer)
            remedy = f"Name a layer by `{self.name}_layer=`; calls without gradients, and inside compiled code, are not seen."
            raise expected(f"{self.name}_layer", "a module that the training step calls", f"{where}, which it does not", remedy)
        if len({rows.shape[1] for rows in seen}) > 1:
            got = f"widths {', '.join(str(rows.shape[1]) for rows in seen)}"
            raise expected(f"{self.name}_layer", "a module that puts out rows of one width", got)
        return torch.cat(seen)

    def _checked(self, term: Any) -> Tensor:
        if not isinstance(term, Tensor) or term.ndim:
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise expected(f"{self.name}_criterion", "one that returns a scalar", got)
        return term

    def _rows(self, output: Any) -> Tensor:
        """Return what a module puts out, one row for each sample."""
        if not isinstance(output, Tensor):
            remedy = f"Name the layer that puts out one tensor by `{self.name}_layer=`."
            return find_outputs(output, remedy)
        return output.flatten(1) if output.ndim > 1 else output.unsqueeze(-1)

    def _source(self, module: LightningModule) -> nn.Module:
        """Return the module whose output is taken."""
        if self._layer is None:
            return module
        parts: dict[str, nn.Module] = dict(module.named_modules())
        return parts[check_layer(f"{self.name}_layer", self._layer, parts)]
