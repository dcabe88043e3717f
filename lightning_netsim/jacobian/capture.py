"""Record what every call of a layer saw in one forward pass, and differentiate with respect to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_netsim.data import trees

#: What a module was called with: positional arguments and keywords.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: δ at each floating-point output of a call, shape (B, d, ...); None where nothing depends on that output.
Deltas = tuple[Tensor | None, ...]


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


def _versions(arguments: list[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in arguments)


@contextmanager
def watch(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record every call of `modules` inside the block, in order."""
    calls: dict[nn.Module, list[Call]] = defaultdict(list)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        args, kwargs = without_inference((args, kwargs))
        outputs = [tensor for tensor in trees.tensors(output) if tensor.is_floating_point()]
        edges = tuple(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs)
        calls[module].append(Call(args, kwargs, edges, _versions(trees.tensors((args, kwargs)))))

    with ExitStack() as stack:
        for module in modules:
            # First in line: a hook of the user's may replace the output.
            stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield calls


def differentiate(
    calls: Mapping[nn.Module, list[Call]], projected: Tensor, create_graph: bool = False
) -> dict[nn.Module, list[tuple[Call, Deltas]]]:
    """Differentiate `projected`, shape (B, d), at the output edges of every call.

    Samples do not interact, so the gradient of Σ_i projected[i, o] holds the gradient of every sample: d backward passes
    give all of them, without any weight gradient.

    Returns:
        for each module the calls on which `projected` depends, each with its δ.
    """
    edges = [edge for some in calls.values() for call in some for edge in call.edges if edge is not None]
    columns: list[Deltas] = []
    num_directions = projected.shape[1]
    for direction in range(num_directions if edges else 0):
        keep = create_graph or direction + 1 < num_directions
        total = projected[:, direction].sum()
        columns.append(torch.autograd.grad(total, edges, retain_graph=keep, create_graph=create_graph, allow_unused=True))
    stacked = iter([_stack(column) for column in zip(*columns, strict=True)])
    reached: dict[nn.Module, list[tuple[Call, Deltas]]] = {}
    for module, some in calls.items():
        pairs = [(call, tuple(None if edge is None else next(stacked) for edge in call.edges)) for call in some]
        reached[module] = [(call, deltas) for call, deltas in pairs if any(delta is not None for delta in deltas)]
    return reached


def _stack(column: Deltas) -> Tensor | None:
    """Stack δ of every direction; a direction that does not depend on the output has zeros."""
    present = [delta for delta in column if delta is not None]
    if not present:
        return None
    if len(column) == 1:
        return present[0].unsqueeze(1)
    return torch.stack([torch.zeros_like(present[0]) if delta is None else delta for delta in column], 1)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over a batch. Here alone it is decided what carries the samples of the batch.

    Attributes:
        model: the model.
        forward: inputs -> projected outputs (B, d).
        inputs: the batch.
        calls: the calls of each watched module on which the outputs depend, each with its δ.
        projected: the projected outputs, shape (B, d).
        create_graph: whether the gradients stay on the graph.
    """

    model: nn.Module
    forward: Callable[[Any], Tensor]
    inputs: Any
    calls: dict[nn.Module, list[tuple[Call, Deltas]]]
    projected: Tensor
    create_graph: bool

    @property
    def batch(self) -> int:
        """Return B."""
        return len(self.projected)

    def carries_batch(self, leaf: Any) -> bool:
        """Return whether dimension 0 of `leaf` stands for the samples."""
        return isinstance(leaf, Tensor) and leaf.shape[:1] == (self.batch,)

    def sample(self, tree: Any, number: int) -> Any:
        """Return one sample of `tree`, as a batch of one."""
        return trees.take(tree, slice(number, number + 1), self.batch)

    def apart(self, tree: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        """Return the tensors in `tree` that carry the batch, and what makes `tree` of one sample from a row of each."""

        def joined(rows: list[Tensor]) -> Any:
            remaining = iter(rows)
            return trees.map_leaves(lambda leaf: next(remaining).unsqueeze(0) if self.carries_batch(leaf) else leaf, tree)

        return [tensor for tensor in trees.tensors(tree) if self.carries_batch(tensor)], joined


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
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if accelerator is not None:
            stack.enter_context(torch.autocast(accelerator.type, enabled=False))
        for backend in backends:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield


@contextmanager
def differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Make gradients possible and exact whatever surrounds: `no_grad`, inference mode, autocast, compiled modules.

    Hooks on a compiled module never fire, so compiled code runs eagerly inside.

    Args:
        model: what is to be run, if it may hold tensors that it cached in inference mode.
    """
    caches = torch.is_inference_mode_enabled() or (model is not None and _holds_inference_tensors(model))
    copying = _CloneInferenceTensors() if caches else nullcontext()
    eager = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(False), torch.enable_grad(), full_float32(), eager, copying:
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Use the attention that `torch.func` and double backward can transform: neither fused kernels nor the fast path."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
