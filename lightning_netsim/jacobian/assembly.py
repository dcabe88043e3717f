"""From one captured pass to the factors of every parameter, each by its own path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim.jacobian import fallbacks
from lightning_netsim.jacobian.capture import Call, Capture
from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, sum_of_calls
from lightning_netsim.jacobian.layers import KNOWN_LAYERS
from lightning_netsim.jacobian.ownership import Method, Path


class PathError(RuntimeError):
    """A path does not fit what a module was called with."""


#: What torch raises when a model cannot be transformed, sliced or called alone: the next path is then taken.
PATH_ERRORS = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over a batch.

    Attributes:
        model: the model.
        forward: inputs -> projected outputs (B, d).
        inputs: the batch.
        capture: what the watched modules saw.
        deltas: δ at every output of every call.
        batch: B.
        create_graph: whether the factors stay on the graph.
    """

    model: nn.Module
    forward: Callable[[Any], Tensor]
    inputs: Any
    capture: Capture
    deltas: dict[nn.Module, list[tuple[Tensor | None, ...]]]
    batch: int
    create_graph: bool

    def calls(self, module: nn.Module) -> list[tuple[Call, tuple[Tensor | None, ...]]]:
        """Return the calls of `module` on which the outputs depend, each with its δ."""
        pairs = zip(self.capture.calls.get(module, []), self.deltas.get(module, []), strict=True)
        return [(call, deltas) for call, deltas in pairs if any(delta is not None for delta in deltas)]


def find_factors(one_pass: Pass, paths: Mapping[str, Path]) -> tuple[dict[str, AbstractFactor], dict[str, Exception]]:
    """Return the factor of every parameter on which the outputs depend, and the error of every path that failed."""
    groups: dict[tuple[Method, nn.Module], list[str]] = defaultdict(list)
    for name, path in paths.items():
        groups[path.method, path.module].append(name)
    factors: dict[str, AbstractFactor] = {}
    failures: dict[str, Exception] = {}
    for (method, module), names in groups.items():
        inner = [paths[name].name for name in names]
        try:
            found = _METHODS[method](one_pass, module, inner)
        except PATH_ERRORS as error:
            failures |= dict.fromkeys(names, error)
            continue
        factors |= {name: found[local] for name, local in zip(names, inner, strict=True) if local in found}
    return factors, failures


def _layer(one_pass: Pass, module: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    build = next(function for kind, function in KNOWN_LAYERS.items() if isinstance(module, kind))
    found: dict[str, list[AbstractFactor]] = defaultdict(list)
    for call, deltas in one_pass.calls(module):
        inputs, delta = call.arguments[0], deltas[0]
        if len(call.arguments) != 1 or delta is None or len(deltas) != 1:
            raise PathError("The layer has more than one input or output.")
        if inputs.shape[:1] != (one_pass.batch,) or delta.shape[0] != one_pass.batch:
            raise PathError(f"Dimension 0 of the layer's input is not the batch: shape {tuple(inputs.shape)}.")
        if not call.arguments_unchanged():
            raise PathError("The layer's input was overwritten after the call.")
        for name, factor in build(module, _kept(inputs, one_pass), _kept(delta, one_pass)).items():
            found[name].append(factor)
    return {name: sum_of_calls(found[name]) for name in names if name in found}


def _kept(tensor: Tensor, one_pass: Pass) -> Tensor:
    """Return `tensor` as a factor keeps it: off the graph unless it is wanted, in float32 or better."""
    return at_least_float32(tensor if one_pass.create_graph else tensor.detach())


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it is in half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _module_vmap(one_pass: Pass, module: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    found = [fallbacks.module_by_vmap(module, names, call, deltas) for call, deltas in _module_calls(one_pass, module)]
    return _dense(one_pass, found, names)


def _module_loop(one_pass: Pass, module: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    found = [
        fallbacks.module_by_loop(module, names, call, deltas, one_pass.create_graph)
        for call, deltas in _module_calls(one_pass, module)
    ]
    return _dense(one_pass, found, names)


def _module_calls(one_pass: Pass, module: nn.Module) -> list[tuple[Call, tuple[Tensor | None, ...]]]:
    calls = one_pass.calls(module)
    for call, deltas in calls:
        if any(delta is not None and delta.shape[0] != one_pass.batch for delta in deltas):
            raise PathError("Dimension 0 of the module's output is not the batch.")
        if not any(tensor.shape[:1] == (one_pass.batch,) for tensor in call.arguments):
            raise PathError("No input of the module has the batch as dimension 0.")
        if not call.arguments_unchanged():
            raise PathError("An input of the module was overwritten after the call.")
    return calls


def _model_vmap(one_pass: Pass, model: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    found = fallbacks.model_by_vmap(model, one_pass.forward, names, one_pass.inputs, one_pass.batch)
    return _dense(one_pass, [found], names)


def _model_loop(one_pass: Pass, model: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    found = fallbacks.model_by_loop(model, one_pass.forward, names, one_pass.inputs, one_pass.batch, one_pass.create_graph)
    return _dense(one_pass, [found], names)


def _dense(one_pass: Pass, calls: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, AbstractFactor]:
    if not calls:
        return {}
    return {name: sum_of_calls([DenseFactor(_kept(call[name], one_pass)) for call in calls]) for name in names}


_METHODS: dict[Method, Callable[[Pass, nn.Module, Sequence[str]], dict[str, AbstractFactor]]] = {
    Method.LAYER: _layer,
    Method.MODULE_VMAP: _module_vmap,
    Method.MODULE_LOOP: _module_loop,
    Method.MODEL_VMAP: _model_vmap,
    Method.MODEL_LOOP: _model_loop,
}
