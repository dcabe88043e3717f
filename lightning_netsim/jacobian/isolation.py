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
    attributes = [{name: (value, _contents(value)) for name, value in vars(module).items()} for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, saved in zip(modules, attributes, strict=True):
            current = vars(module)
            for name in current.keys() - saved.keys():
                del current[name]
            current.update({name: value for name, (value, _) in saved.items()})
            for value, contents in saved.values():
                if isinstance(contents, Tensor):
                    _write(value, contents)
                elif isinstance(contents, list):
                    value[:] = contents
                elif contents is not None:
                    value.clear()
                    value.update(contents)
        for buffer, contents in buffers:
            _write(buffer, contents)


def _contents(value: Any) -> Any:
    """Return a copy of what a forward pass may change in place; None of anything else."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None


def _write(tensor: Tensor, contents: Tensor) -> None:
    """Write a tensor only if it was changed: autograd counts what is written."""
    with torch.no_grad():
        if not torch.equal(tensor, contents):
            tensor.copy_(contents)


@contextmanager
def muted(model: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Make `log` of every module of a class do nothing inside the block."""
    saved = [(vars(module), vars(module).get("log")) for module in model.modules() if isinstance(module, kind)]
    mute(model, kind)
    try:
        yield
    finally:
        for attributes, log in saved:
            if log is None:
                del attributes["log"]
            else:
                attributes["log"] = log


def mute(model: nn.Module, kind: type[nn.Module]) -> None:
    """Make `log` of every module of a class do nothing, until the `unchanged` block ends that this is called in."""
    for module in model.modules():
        if isinstance(module, kind):
            vars(module)["log"] = lambda *args, **kwargs: None
