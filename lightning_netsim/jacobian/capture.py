"""Record what every call of a layer saw in one forward pass, and differentiate with respect to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_netsim.data import trees


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and where its floating-point outputs stand in the autograd graph.

    The edge is taken when the call returns. The output *tensor* may be overwritten by an in-place operation later on, and a
    gradient with respect to it would then silently be that of the overwritten value.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edges: tuple[GradientEdge | None, ...]
    versions: tuple[int, ...]

    @property
    def arguments(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return trees.tensors((self.args, self.kwargs))

    def arguments_unchanged(self) -> bool:
        """Return whether no argument was overwritten since the call."""
        return self.versions == _versions(self.arguments)


@dataclass(frozen=True)
class Capture:
    """One forward pass: the outputs of the model and the calls of the watched modules, in order."""

    outputs: Tensor
    calls: dict[nn.Module, list[Call]]

    def deltas(self, projected: Tensor, create_graph: bool = False) -> dict[nn.Module, list[tuple[Tensor | None, ...]]]:
        """Differentiate `projected`, shape (B, d), at the output edges of every call.

        Samples do not interact, so the gradient of Σ_i projected[i, o] holds the gradient of every sample: d backward passes
        give all of them, without any weight gradient.

        Returns:
            for each module and call, for each of its floating-point outputs: δ of shape (B, d, ...), or None where
            `projected` does not depend on it.
        """
        edges = [edge for calls in self.calls.values() for call in calls for edge in call.edges if edge is not None]
        columns: list[tuple[Tensor | None, ...]] = []
        num_directions = projected.shape[1]
        for direction in range(num_directions if edges else 0):
            keep = create_graph or direction + 1 < num_directions
            total = projected[:, direction].sum()
            columns.append(torch.autograd.grad(total, edges, retain_graph=keep, create_graph=create_graph, allow_unused=True))
        stacked = iter([_stack(column) for column in zip(*columns, strict=True)])
        return {
            module: [tuple(None if edge is None else next(stacked) for edge in call.edges) for call in calls]
            for module, calls in self.calls.items()
        }


def _versions(arguments: list[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in arguments)


def _stack(column: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [delta for delta in column if delta is not None]
    if not present:
        return None
    if len(column) == 1:
        return present[0].unsqueeze(1)
    return torch.stack([torch.zeros_like(present[0]) if delta is None else delta for delta in column], 1)


def capture(forward: Callable[[], Any], modules: Collection[nn.Module]) -> Capture:
    """Run `forward` once and record every call of `modules`."""
    with watch(modules) as calls:
        outputs = forward()
    return Capture(outputs, dict(calls))


@contextmanager
def watch(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record every call of `modules` inside the block."""
    calls: dict[nn.Module, list[Call]] = defaultdict(list)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        args, kwargs = without_inference((args, kwargs))
        outputs = [tensor for tensor in trees.tensors(output) if tensor.is_floating_point()]
        record = Call(
            args=args,
            kwargs=kwargs,
            edges=tuple(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs),
            versions=_versions(trees.tensors((args, kwargs))),
        )
        calls[module].append(record)

    with ExitStack() as stack:
        for module in modules:
            # First in line: a hook of the user's may replace the output.
            stack.enter_context(_removed(module.register_forward_hook(hook, with_kwargs=True, prepend=True)))
        yield calls


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _CloneInferenceTensors(TorchFunctionMode):
    """Hand every function a normal copy of the inference tensors among its arguments (masks that a model cached)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.is_inference and any(leaf.is_inference() for leaf in trees.tensors((args, kwargs))):
            args, kwargs = without_inference((args, kwargs))
        return func(*args, **kwargs)


def without_inference(tree: Any) -> Any:
    """Return `tree` with a normal copy of every inference tensor in it."""

    def normal(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

    with torch.inference_mode(False):
        return trees.map_leaves(normal, tree)


def _holds_inference_tensors(model: nn.Module) -> bool:
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in held):
                return True
    return False


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch off autocast, and the rounding of factors to ten bits that CUDA devices do by default in convolutions."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv"))  # noqa: B009
    saved = [backend.fp32_precision for backend in backends]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if accelerator is not None:
            stack.enter_context(torch.autocast(accelerator.type, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, saved, strict=True):
                backend.fp32_precision = precision


@contextmanager
def differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Make gradients possible and exact whatever surrounds: `no_grad`, inference mode, autocast, compiled modules.

    Hooks on a compiled module never fire, so compiled code runs eagerly inside.

    Args:
        model: what is to be run, if it may hold tensors that it cached in inference mode.
    """
    cloning = torch.is_inference_mode_enabled() or (model is not None and _holds_inference_tensors(model))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_float32())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if cloning:
            stack.enter_context(_CloneInferenceTensors())
        yield
