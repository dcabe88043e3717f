"""See to it that the parameters of a criterion, such as the proxies of classes, are optimized with those of the module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_netsim._checks import expected


def adding_parameters(configure: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `configure_optimizers` whose optimizers know the parameters of all criteria of the module.

    What an optimizer does not have yet goes into its first group, and follows the learning rate there; or, where the
    regularizer has a `learning_rate`, into a group of its own.
    """

    @functools.wraps(configure)
    def configure_optimizers(self: Any) -> Any:
        configured = configure(self)
        optimizers = list(_found(configured, Optimizer))
        is_scheduled = any(True for _ in _found(configured, LRScheduler))
        for regularizer in self._regularizers:
            regularizer.prepare(self)
            regularizer.is_prepared = True
            if optimizers:
                _add_parameters(regularizer, regularizer.criterion(self), optimizers, is_scheduled)
        return configured

    configure_optimizers._adds_parameters = True  # type: ignore[attr-defined]
    return configure_optimizers


def _found(configured: Any, kind: type) -> Iterator[Any]:
    """Yield the objects of one kind in what `configure_optimizers` returned, in any of the forms that Lightning takes."""
    if isinstance(configured, kind):
        yield configured
    elif isinstance(configured, (Mapping, list, tuple)):
        for part in configured.values() if isinstance(configured, Mapping) else configured:
            yield from _found(part, kind)


def _add_parameters(regularizer: Any, criterion: Any, optimizers: list[Any], is_scheduled: bool) -> None:
    """Put the parameters of a criterion into a group of their own where they have a rate, else into the first if in none."""
    name, rate = regularizer.name, regularizer.learning_rate
    parameters = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if rate is None:
        known = {id(parameter) for group in groups for parameter in group["params"]}
        missing = [parameter for parameter in parameters if id(parameter) not in known]
        if missing:
            groups[0]["params"].extend(missing)
            if "param_names" in groups[0]:
                groups[0]["param_names"].extend(f"{name}_criterion.{index}" for index in range(len(missing)))
            count = sum(parameter.numel() for parameter in missing)
            rank_zero_info(f"The {count:,} parameters of `{name}_criterion` are trained in the first group of the optimizer.")
        return
    if not parameters:
        raise expected(f"{name}_learning_rate", "None for a criterion without parameters of its own", f"{rate}")
    ours = {id(parameter) for parameter in parameters}
    if any(ours == {id(parameter) for parameter in group["params"]} and group["lr"] == rate for group in groups):
        return  # A `configure_optimizers` that calls that of its parent class comes here twice.
    if is_scheduled:
        remedy = f"Give `self.{name}_criterion.parameters()` a group of its own in `configure_optimizers` instead."
        raise expected(f"{name}_learning_rate", "None beside a learning rate scheduler", f"{rate}", remedy)
    for group in groups:
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    optimizers[0].add_param_group({"params": parameters, "lr": rate})
