"""Which path gives the gradients of each parameter, and the factors from one captured pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_netsim._checks import expected
from lightning_netsim.jacobian import fallbacks
from lightning_netsim.jacobian.capture import Call, Capture
from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, sum_of_calls
from lightning_netsim.jacobian.layers import KNOWN_LAYERS


class Method(Enum):
    """How a per-sample gradient is found, cheapest first."""

    LAYER = "factored from the layer's input and output gradient"
    MODULE_VMAP = "torch.func over samples of one module"
    MODULE_LOOP = "a loop over samples of one module"
    MODEL_VMAP = "torch.func over samples of the whole model"
    MODEL_LOOP = "a loop over samples of the whole model"


@dataclass(frozen=True)
class Path:
    """One way to the per-sample gradient of a parameter.

    Attributes:
        method: how.
        module: the module that is watched; the model itself for the last two methods.
        name: the parameter's name inside `module`.
    """

    method: Method
    module: nn.Module
    name: str


class Ownership:
    """For each parameter the paths that may be taken, best first. A path that proves wrong is dropped for good.

    Args:
        model: the model.
        parameters: ``"trainable"``, or names of parameters or modules; only those that require a gradient count.

    Raises:
        ValueError: if a name is unknown, or nothing to differentiate is left.
    """

    def __init__(self, model: nn.Module, parameters: str | Iterable[str] = "trainable") -> None:
        names = _chosen(model, parameters)
        self.parameters = {name: model.get_parameter(name) for name in names}
        self._paths = {name: _candidates(model, name) for name in names}

    def path(self, name: str) -> Path:
        """Return the path now taken for parameter `name`."""
        return self._paths[name][0]

    def paths(self) -> dict[str, Path]:
        """Return the path now taken for every parameter."""
        return {name: candidates[0] for name, candidates in self._paths.items()}

    def demote(self, name: str) -> bool:
        """Drop the path now taken for parameter `name`; return whether another is left."""
        if len(self._paths[name]) == 1:
            return False
        self._paths[name].pop(0)
        return True

    def methods(self) -> dict[str, int]:
        """Return how many parameter tensors each method serves, by the method's name in lower case."""
        counts: dict[str, int] = {}
        for path in self.paths().values():
            counts[path.method.name.lower()] = counts.get(path.method.name.lower(), 0) + 1
        return counts


def _chosen(model: nn.Module, parameters: str | Iterable[str]) -> list[str]:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise expected(
            "model",
            "a module with at least one trainable parameter",
            "none",
            "Set `requires_grad` on what you want to compare by.",
        )
    if parameters == "trainable":
        return trainable
    prefixes = [parameters] if isinstance(parameters, str) else list(parameters)
    for prefix in prefixes:
        if not any(_matches(name, prefix) for name in trainable):
            raise expected("parameters", '"trainable" or names of trainable parameters or their modules', repr(prefix))
    return [name for name in trainable if any(_matches(name, prefix) for prefix in prefixes)]


def _matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _candidates(model: nn.Module, name: str) -> list[Path]:
    """Return the paths for one parameter: its layer, then the modules around it from the inside out, then the model."""
    parameter = model.get_parameter(name)
    owners = [module for module in model.modules() if any(p is parameter for p in module._parameters.values())]
    paths: list[Path] = []
    if len(owners) == 1:
        owner_name, _, local = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if is_known_layer(owner):
            paths.append(Path(Method.LAYER, owner, local))
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            module, inner = model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
            # Containers are never called.
            if type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                paths += [Path(method, module, inner) for method in (Method.MODULE_VMAP, Method.MODULE_LOOP)]
    return [*paths, Path(Method.MODEL_VMAP, model, name), Path(Method.MODEL_LOOP, model, name)]


def is_known_layer(module: nn.Module) -> bool:
    """Return whether `module` is a layer whose gradients are known in factored form, and does nothing beside it."""
    kind = next((kind for kind in KNOWN_LAYERS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward:
        return False
    plain = not (is_parametrized(module) or module._forward_pre_hooks or any(module.children()))
    return plain and set(module._parameters) <= {"weight", "bias"}


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
