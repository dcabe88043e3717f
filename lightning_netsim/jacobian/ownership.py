"""Which path gives the per-sample gradient of each parameter: its layer, a module, the whole model, or a loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_netsim._checks import expected
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
