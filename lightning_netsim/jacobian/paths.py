"""Which path gives the gradients of each parameter, and how each path finds them in one pass over a batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.parametrize import is_parametrized

from lightning_netsim._checks import expected
from lightning_netsim.data import trees
from lightning_netsim.jacobian.capture import Arguments, Deltas, Pass, plain_attention
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
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trainable:
            raise expected(
                "model",
                "a module with at least one trainable parameter",
                "none",
                "Set `requires_grad` on what you want to compare by.",
            )
        if parameters == "trainable":
            prefixes = list(trainable)
        else:
            prefixes = [parameters] if isinstance(parameters, str) else list(parameters)
        for prefix in prefixes:
            if not any(_matches(name, prefix) for name in trainable):
                raise expected("parameters", '"trainable" or names of trainable parameters or their modules', repr(prefix))
        self.parameters = {name: p for name, p in trainable.items() if any(_matches(name, prefix) for prefix in prefixes)}
        self._paths = {name: _candidates(model, name) for name in self.parameters}

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
        return dict(Counter(path.method.name.lower() for path in self.paths().values()))


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
            found = _factored(one_pass, module) if method is Method.LAYER else _formed(one_pass, method, module, inner)
        except PATH_ERRORS as error:
            failures |= dict.fromkeys(names, error)
            continue
        factors |= {name: found[local] for name, local in zip(names, inner, strict=True) if local in found}
    return {name: factors[name] for name in paths if name in factors}, failures


def _factored(one_pass: Pass, module: nn.Module) -> dict[str, AbstractFactor]:
    """Return the gradients of the parameters of a known layer: the sum over its calls."""
    build = next(function for kind, function in KNOWN_LAYERS.items() if isinstance(module, kind))
    found: dict[str, list[AbstractFactor]] = defaultdict(list)
    for call, deltas in one_pass.calls.get(module, []):
        inputs, delta = call.arguments[0], deltas[0]
        if len(call.arguments) != 1 or delta is None or len(deltas) != 1:
            raise PathError("The layer has more than one input or output.")
        if not (one_pass.carries_batch(inputs) and one_pass.carries_batch(delta)):
            raise PathError(f"Dimension 0 of the layer's input is not the batch: shape {tuple(inputs.shape)}.")
        if not call.arguments_unchanged():
            raise PathError("The layer's input was overwritten after the call.")
        for name, factor in build(module, _kept(inputs, one_pass), _kept(delta, one_pass)).items():
            found[name].append(factor)
    return {name: sum_of_calls(factors) for name, factors in found.items()}


def _formed(one_pass: Pass, method: Method, module: nn.Module, names: Sequence[str]) -> dict[str, AbstractFactor]:
    """Return the gradients of parameters without a factored form, of a module or of the whole model."""
    found: list[dict[str, Tensor]] = []
    if method is Method.MODEL_VMAP:
        # One call whose output is the projected outputs: their gradient by themselves is the identity.
        projected = one_pass.projected
        identity = torch.eye(projected.shape[1], dtype=projected.dtype, device=projected.device).expand(one_pass.batch, -1, -1)
        inner = [f"model.{name}" for name in names]
        gradients = _by_vmap(one_pass, _Runner(one_pass), inner, ((one_pass.inputs,), {}), (identity,))
        found.append(dict(zip(names, (gradients[name] for name in inner), strict=True)))
    elif method is Method.MODEL_LOOP:
        found.append(_model_by_loop(one_pass, names))
    else:
        find = _by_vmap if method is Method.MODULE_VMAP else _module_by_loop
        for call, deltas in one_pass.calls.get(module, []):
            if not all(delta is None or one_pass.carries_batch(delta) for delta in deltas):
                raise PathError("Dimension 0 of the module's output is not the batch.")
            if not any(one_pass.carries_batch(tensor) for tensor in call.arguments):
                raise PathError("No input of the module has the batch as dimension 0.")
            if not call.arguments_unchanged():
                raise PathError("An input of the module was overwritten after the call.")
            found.append(find(one_pass, module, names, (call.args, call.kwargs), deltas))
    if not found:
        return {}
    return {name: sum_of_calls(DenseFactor(_kept(gradients[name], one_pass)) for gradients in found) for name in names}


def _kept(tensor: Tensor, one_pass: Pass) -> Tensor:
    """Return `tensor` as a factor keeps it: off the graph unless it is wanted, in float32 or better."""
    tensor = tensor if one_pass.create_graph else tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _by_vmap(
    one_pass: Pass, module: nn.Module, names: Sequence[str], arguments: Arguments, deltas: Deltas
) -> dict[str, Tensor]:
    """Differentiate a call of `module` alone, all samples at once: for each name, shape (B, d, *shape)."""
    batched, joined = one_pass.apart(arguments)
    parameters = {name: module.get_parameter(name) for name in names}

    def one_sample(rows: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
        args, kwargs = joined(rows)
        pull = vjp(lambda values: _reached(functional_call(module, values, args, kwargs), deltas), parameters)[1]
        gradients: dict[str, Tensor] = vmap(lambda *columns: pull([column.unsqueeze(0) for column in columns])[0])(*cotangents)
        return gradients

    with plain_attention():
        found: dict[str, Tensor] = vmap(one_sample)(batched, [delta for delta in deltas if delta is not None])
    return found


def _module_by_loop(
    one_pass: Pass, module: nn.Module, names: Sequence[str], arguments: Arguments, deltas: Deltas
) -> dict[str, Tensor]:
    """Differentiate a call of `module` alone, sample by sample; result as in `_by_vmap`."""
    # An alias of each parameter: where the inputs depend on the same parameter, that path belongs to another call.
    values = {name: module.get_parameter(name).view_as(module.get_parameter(name)) for name in names}

    def one_sample(number: int) -> tuple[list[Tensor], list[list[Tensor]]]:
        args, kwargs = one_pass.sample(arguments, number)
        rows = [delta[number] for delta in deltas if delta is not None]
        outputs = _reached(functional_call(module, values, args, kwargs), deltas)
        return outputs, [[row[column].unsqueeze(0) for row in rows] for column in range(len(rows[0]))]

    return _by_loop(one_pass, values, one_sample)


class _Runner(nn.Module):
    """Make the forward pass a module, so that `functional_call` can swap the parameters inside it."""

    def __init__(self, one_pass: Pass) -> None:
        super().__init__()
        self.model = one_pass.model
        self._run = one_pass.forward

    def forward(self, inputs: Any) -> Tensor:
        return self._run(inputs)


def _model_by_loop(one_pass: Pass, names: Sequence[str]) -> dict[str, Tensor]:
    """Differentiate the projected outputs of the whole model, sample by sample; result as in `_by_vmap`."""

    def one_sample(number: int) -> tuple[list[Tensor], list[list[Tensor]]]:
        outputs = one_pass.forward(one_pass.sample(one_pass.inputs, number))
        identity = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return [outputs], [[row.unsqueeze(0)] for row in identity]

    return _by_loop(one_pass, {name: one_pass.model.get_parameter(name) for name in names}, one_sample)


def _by_loop(
    one_pass: Pass, parameters: Mapping[str, Tensor], one_sample: Callable[[int], tuple[list[Tensor], list[list[Tensor]]]]
) -> dict[str, Tensor]:
    """Differentiate what `one_sample` returns for each sample: some outputs, and for each direction the cotangents of these."""
    samples = []
    for number in range(one_pass.batch):
        outputs, directions = one_sample(number)
        rows = [
            torch.autograd.grad(
                outputs,
                list(parameters.values()),
                cotangents,
                retain_graph=True,
                create_graph=one_pass.create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            for cotangents in directions
        ]
        samples.append([torch.stack(column) for column in zip(*rows, strict=True)])
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*samples, strict=True), strict=True)}


def _reached(output: Any, deltas: Deltas) -> list[Tensor]:
    """Return the outputs of a call that carry a gradient, in the order in which the capture saw them."""
    found = [tensor for tensor in trees.tensors(output) if tensor.is_floating_point()]
    return [tensor for tensor, delta in zip(found, deltas, strict=False) if delta is not None]
