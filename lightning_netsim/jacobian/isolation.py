"""Leave a model as it was found, whatever its forward pass does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore after the block: modes, buffers, and the plain attributes, lists and metric states of every module.

    A forward pass may count its calls, cache a mask, append to a list or update a metric; none of it is to be seen afterwards.
    Parameters and their gradients are not touched by anything in this package.
    """
    modules = list(model.modules())
    attributes = [_copied(vars(module)) for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, saved in zip(modules, attributes, strict=True):
            _restore(module, saved)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def muted(model: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Make `log` of every module of a class do nothing inside the block."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    saved = [vars(module).get("log") for module in modules]
    mute(model, kind)
    try:
        yield
    finally:
        for module, log in zip(modules, saved, strict=True):
            if log is None:
                del vars(module)["log"]
            else:
                vars(module)["log"] = log


def mute(model: nn.Module, kind: type[nn.Module]) -> None:
    """Make `log` of every module of a class do nothing, until the `unchanged` block ends that this is called in."""
    for module in model.modules():
        if isinstance(module, kind):
            vars(module)["log"] = _log_nothing


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for `LightningModule.log`."""


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute with a copy of its contents, where it is one that a forward pass may change in place."""
    return {name: (value, _contents(value)) for name, value in attributes.items()}


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if type(value) in (list, dict, set):
        return value.copy()
    return None


def _restore(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    current = vars(module)
    for name in [name for name in current if name not in saved]:
        del current[name]
    for name, (value, contents) in saved.items():
        current[name] = value
        if contents is None:
            continue
        if isinstance(value, Tensor):
            if not torch.equal(value.detach(), contents):
                with torch.no_grad():
                    value.copy_(contents)
        elif isinstance(value, list):
            value[:] = contents
        else:
            value.clear()
            value.update(contents)
