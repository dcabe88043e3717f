"""Per-sample gradients of whatever has no factored form: by `torch.func` over samples, or by a loop, which always exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_netsim.data import trees
from lightning_netsim.jacobian.capture import Call

Gradients = dict[str, Tensor]


def module_by_vmap(module: nn.Module, names: Sequence[str], call: Call, deltas: Sequence[Tensor | None]) -> Gradients:
    """Differentiate one call of `module` alone, all samples at once.

    Args:
        module: the module.
        names: its parameters to differentiate.
        call: what it was called with.
        deltas: δ at each of its outputs, shape (B, d, ...).

    Returns:
        for each name: shape (B, d, *shape).
    """
    inputs, outputs = (call.args, call.kwargs), _present(deltas)
    batch = outputs[0].shape[0]
    parameters = {name: module.get_parameter(name) for name in names}

    def run(sample: Any, values: Gradients) -> list[Tensor]:
        args, kwargs = sample
        return _differentiable(functional_call(module, values, args, kwargs), deltas)

    def one_sample(samples: list[Tensor], cotangents: list[Tensor]) -> Gradients:
        sample = _with_batched(inputs, [tensor.unsqueeze(0) for tensor in samples], batch)
        pull = vjp(lambda values: run(sample, values), parameters)[1]
        rows: Gradients = vmap(lambda *columns: pull([column.unsqueeze(0) for column in columns])[0])(*cotangents)
        return rows

    with plain_attention():
        gradients: Gradients = vmap(one_sample)(_batched(inputs, batch), outputs)
    return gradients


def module_by_loop(
    module: nn.Module, names: Sequence[str], call: Call, deltas: Sequence[Tensor | None], create_graph: bool = False
) -> Gradients:
    """Differentiate one call of `module` alone, sample by sample; arguments and result as in `module_by_vmap`."""
    inputs, outputs = (call.args, call.kwargs), _present(deltas)
    batch, directions = outputs[0].shape[:2]
    # An alias of each parameter: where the inputs depend on the same parameter, that path belongs to another call.
    values = {name: module.get_parameter(name).view_as(module.get_parameter(name)) for name in names}
    rows = []
    for sample in range(batch):
        args, kwargs = trees.take(inputs, slice(sample, sample + 1), batch)
        results = _differentiable(functional_call(module, values, args, kwargs), deltas)
        cotangents = [[delta[sample : sample + 1, column] for delta in outputs] for column in range(directions)]
        rows.append(_pull_rows(results, list(values.values()), cotangents, create_graph))
    return _collect(names, rows)


def model_by_vmap(
    model: nn.Module, forward: Callable[[Any], Tensor], names: Sequence[str], inputs: Any, batch: int
) -> Gradients:
    """Differentiate the projected outputs of the whole model with respect to the parameters `names`, all samples at once.

    Args:
        model: the module that owns the parameters.
        forward: inputs -> projected outputs (B, d), running `model`.
        names: the parameters to differentiate.
        inputs: the batch.
        batch: B.

    Returns:
        for each name: shape (B, d, *shape).
    """
    runner = _Runner(model, forward)
    parameters = {f"model.{name}": model.get_parameter(name) for name in names}

    def one_sample(samples: list[Tensor]) -> Gradients:
        sample = _with_batched(inputs, [tensor.unsqueeze(0) for tensor in samples], batch)
        outputs, pull = vjp(lambda values: functional_call(runner, values, (sample,), tie_weights=True), parameters)[:2]
        identity = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        rows: Gradients = vmap(lambda row: pull(row.unsqueeze(0))[0])(identity)
        return rows

    with plain_attention():
        gradients = vmap(one_sample)(_batched(inputs, batch))
    return {name: gradients[f"model.{name}"] for name in names}


def model_by_loop(
    model: nn.Module,
    forward: Callable[[Any], Tensor],
    names: Sequence[str],
    inputs: Any,
    batch: int,
    create_graph: bool = False,
) -> Gradients:
    """Differentiate the whole model sample by sample; arguments and result as in `model_by_vmap`."""
    parameters = [model.get_parameter(name) for name in names]
    rows = []
    for sample in range(batch):
        outputs = forward(trees.take(inputs, slice(sample, sample + 1), batch))
        cotangents = [[row.unsqueeze(0)] for row in torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)]
        rows.append(_pull_rows([outputs], parameters, cotangents, create_graph))
    return _collect(names, rows)


class _Runner(nn.Module):
    """Make a function that runs `model` a module, so that `functional_call` can swap the parameters inside it."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._forward_function = forward

    def forward(self, inputs: Any) -> Tensor:
        return self._forward_function(inputs)


def _pull_rows(
    results: list[Tensor], parameters: Sequence[Tensor], cotangents: list[list[Tensor]], create_graph: bool = False
) -> list[list[Tensor]]:
    rows = []
    for cotangent in cotangents:
        found = torch.autograd.grad(
            results, parameters, cotangent, retain_graph=True, allow_unused=True, create_graph=create_graph
        )
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    return rows


def _collect(names: Sequence[str], rows: list[list[list[Tensor]]]) -> Gradients:
    """Stack rows[sample][direction][parameter] into (B, d, *shape) for each parameter."""
    return {
        name: torch.stack([torch.stack([direction[position] for direction in sample]) for sample in rows])
        for position, name in enumerate(names)
    }


def _present(deltas: Sequence[Tensor | None]) -> list[Tensor]:
    return [delta for delta in deltas if delta is not None]


def _differentiable(output: Any, deltas: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the outputs that carry a gradient, in the order in which the capture saw them."""
    found = [tensor for tensor in trees.tensors(output) if tensor.is_floating_point()]
    return [tensor for tensor, delta in zip(found, deltas, strict=False) if delta is not None]


def _batched(tree: Any, batch: int) -> list[Tensor]:
    return [tensor for tensor in trees.tensors(tree) if tensor.ndim > 0 and tensor.shape[0] == batch]


def _with_batched(tree: Any, replacements: list[Tensor], batch: int) -> Any:
    remaining = iter(replacements)

    def replace(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return next(remaining) if is_batched else leaf

    return trees.map_leaves(replace, tree)


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
