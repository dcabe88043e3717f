"""A model as an operator: a batch in, its per-sample Jacobian out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_netsim._checks import expected
from lightning_netsim.data import trees
from lightning_netsim.jacobian.capture import (
    Call,
    Pass,
    differentiable,
    differentiate,
    plain_attention,
    watch,
    without_inference,
)
from lightning_netsim.jacobian.directions import Directions, DirectionsLike
from lightning_netsim.jacobian.paths import Method, Ownership, find_factors
from lightning_netsim.jacobian.per_sample import PerSampleJacobian
from lightning_netsim.jacobian.tangents import ComposedNormalizations, forward_derivatives

logger = logging.getLogger(__name__)

CHECK_SAMPLES = 8
CHECK_TOLERANCE = 1e-4
_OUTPUT_REMEDY = "Define `similarity_step` (or pass `forward`) to return the outputs to compare."


class JacobianOperator:
    """Turn batches into per-sample Jacobians of one model, and know for each parameter the path that is right for it.

    `prepare` looks at the model on at most 8 samples of a first batch. It checks the output, and that samples do not interact.
    Then, for random weights R_i that differ by sample, Σ_i G(x_i) R_i must equal what autograd gives, parameter by parameter,
    to a relative 1e-4. A parameter that fails moves to the next path: factored from its layer, its module alone under
    `torch.func`, the whole model under `torch.func`, a loop over samples.

    Args:
        model: the module whose parameters are differentiated.
        forward: inputs -> outputs (B, D), running `model`; by default `model(inputs)`, `model(*inputs)` for a tuple,
            `model(**inputs)` for a mapping.
        directions: see `Directions`.
        parameters: ``"trainable"``, or names of parameters or of modules.
        seed: seed of random directions.
        create_graph: keep the graph, so that the result can be differentiated again.

    Raises:
        ValueError: for unusable arguments; later, for a model whose outputs cannot be compared.

    Example:
        >>> operator = JacobianOperator(torch.nn.Linear(3, 2))
        >>> operator(torch.ones(4, 3)).gram().shape
        torch.Size([4, 2, 2])
        >>> operator.ownership.methods()
        {'layer': 2}
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any] | None = None,
        directions: DirectionsLike | Directions = "all",
        parameters: str | Iterable[str] = "trainable",
        seed: int = 0,
        create_graph: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise expected("model", "a torch.nn.Module", type(model).__name__)
        self.model = model
        self.directions = directions if isinstance(directions, Directions) else Directions(directions, seed)
        self.create_graph = create_graph
        self.ownership = Ownership(model, parameters)
        self._forward = forward or partial(_call, model)
        self._prepared = False

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every parameter that is differentiated, by name."""
        return {name: parameter.shape for name, parameter in self.ownership.parameters.items()}

    def __call__(self, inputs: Any, labels: Tensor | None = None) -> PerSampleJacobian:
        """Return the per-sample Jacobian of a batch; `prepare` looks at the first one.

        Args:
            inputs: the batch, as the model takes it.
            labels: shape (B,), only for ``directions="target"`` and ``"contrast"``.
        """
        if not self._prepared:
            self.prepare(inputs, labels)
        with _exact(self.model, self.create_graph):
            return _complete(self._jacobian(without_inference(inputs), labels, self.create_graph))

    @contextmanager
    def watch(self) -> Iterator[dict[nn.Module, list[Call]]]:
        """Record what `read` needs of a forward pass that somebody else runs inside the block.

        Attention runs by kernels that can be differentiated twice. Everything else is as the block has it: the pass must not
        run under autocast or in compiled code, and no two samples may depend on each other.
        """
        with plain_attention(), watch(self._watched()) as calls:
            yield calls

    def read(
        self, calls: dict[nn.Module, list[Call]], outputs: Tensor, inputs: Any, labels: Tensor | None = None
    ) -> PerSampleJacobian:
        """Return the per-sample Jacobian from a forward pass that `watch` has recorded.

        Args:
            calls: what `watch` recorded.
            outputs: what the model returned, shape (B, D).
            inputs: the batch, as `forward` takes it; run again for parameters that have no factored form.
            labels: as in a call.
        """
        if not self._prepared:  # As after a first batch with nothing finite in it.
            self.prepare(inputs, labels)
        with _exact(self.model, self.create_graph):
            return _complete(self._read(calls, outputs, inputs, labels, self.create_graph))

    def tangent(self, inputs: Any, direction: Any, labels: Tensor | None = None) -> PerSampleJacobian:
        """Return ∂_x G(x_i)·e_i, the derivative of the per-sample Jacobian as the inputs move along e.

        It is lim (G(x + εe) − G(x))/ε. The derivative of each part that the factors keep is taken by differentiating backward
        passes: what a pass gives is linear in what it starts from, and its derivative by that is the forward derivative.

        Args:
            inputs: the batch, as the model takes it.
            direction: e, as `inputs`: a tensor for each floating-point tensor in it, of the same shape.
            labels: as in a call.

        Raises:
            ValueError: if `direction` does not fit.
        """
        if not self._prepared:
            self.prepare(inputs, labels)
        pairs = trees.floating_pairs(inputs, direction)
        with _exact(self.model, create_graph=True), ComposedNormalizations():
            leaves = {id(leaf): leaf.detach().clone().requires_grad_() for leaf, _ in pairs}
            moving = trees.map_leaves(lambda leaf: leaves.get(id(leaf), leaf), inputs)
            jacobian = _complete(self._jacobian(moving, labels, create_graph=True))
            kept = [*jacobian.parts, jacobian.outputs]
            motion = forward_derivatives(kept, [leaves[id(leaf)] for leaf, _ in pairs], [e for _, e in pairs])
            outputs = torch.zeros_like(jacobian.outputs) if motion[-1] is None else motion[-1]
            moved = jacobian.derivative(motion[:-1], outputs)
        return moved if self.create_graph else moved.detached()

    def prepare(self, inputs: Any, labels: Tensor | None = None) -> None:
        """Check the model, and find the right path for every parameter, on at most 8 samples of `inputs`."""
        _refuse_batch_statistics(self.model)
        inputs = without_inference(inputs)
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), _exact(self.model, self.create_graph):
            few, few_labels = self._few_samples(inputs, labels)
            few, few_labels = self._finite_samples(few, few_labels)
            if few is None:  # Nothing finite to compare: paths that raise are left, and the next batch is looked at.
                while errors := self._jacobian(inputs, labels, create_graph=False)[1]:
                    self._demote({name: str(error) for name, error in errors.items()})
                return
            while failures := self._failures(few, few_labels):
                self._demote(failures)
        self._prepared = True
        logger.debug("Per-sample gradients by method: %s", self.ownership.methods())

    def _few_samples(self, inputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return at most 8 samples, after checking that each has the same output alone as in company."""
        size = trees.batch_size(inputs) or 1
        count = min(CHECK_SAMPLES, size)
        few = trees.take(inputs, slice(0, count), size)
        with torch.no_grad():
            outputs = self._seeded_outputs(few, seed=0)
            if len(outputs) != count:
                return inputs, labels
            if count > 1 and torch.equal(outputs.nan_to_num(), self._seeded_outputs(few, seed=1).nan_to_num()):
                half = count // 2
                _refuse_interaction(self._seeded_outputs(trees.take(few, slice(0, half), count), seed=0), outputs[:half])
        return few, labels[:count] if isinstance(labels, Tensor) and labels.ndim else labels

    def _finite_samples(self, inputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return the samples with finite outputs and gradients, (None, None) if there are none."""
        jacobian, _ = self._jacobian(inputs, labels, create_graph=False)
        finite = torch.isfinite(jacobian.outputs).all(1) & torch.isfinite(jacobian.gram()).flatten(1).all(1)
        if bool(finite.all()):
            return inputs, labels
        index = finite.nonzero().squeeze(1)
        if len(index) == 0:
            return None, None
        return trees.take(inputs, index, len(finite)), None if labels is None else labels[index.to(labels.device)]

    def _seeded_outputs(self, inputs: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return _read_outputs(self._forward(inputs))

    def _jacobian(
        self, inputs: Any, labels: Tensor | None, create_graph: bool
    ) -> tuple[PerSampleJacobian, dict[str, Exception]]:
        """Run the model and differentiate it; return the Jacobian, and the error of each parameter whose path failed."""
        with watch(self._watched()) as calls:
            outputs = self._forward(inputs)
        return self._read(calls, outputs, inputs, labels, create_graph)

    def _watched(self) -> set[nn.Module]:
        """Return the modules whose calls are to be recorded."""
        paths = self.ownership.paths().values()
        return {path.module for path in paths if path.method not in (Method.MODEL_VMAP, Method.MODEL_LOOP)}

    def _read(
        self, calls: dict[nn.Module, list[Call]], outputs: Any, inputs: Any, labels: Tensor | None, create_graph: bool
    ) -> tuple[PerSampleJacobian, dict[str, Exception]]:
        """Return the Jacobian from one forward pass, and the error of each parameter whose path failed."""
        outputs = _read_outputs(outputs)
        if not outputs.requires_grad:
            raise expected(
                "outputs",
                "differentiable",
                "no gradient",
                "Remove `detach()` and `no_grad` between the parameters and the outputs.",
            )
        if self._watched() and not calls:
            raise expected("forward", "a function that runs the modules of `model`", "one that calls none of them")
        projected = self.directions.project(outputs, labels)
        reached = differentiate(calls, projected, create_graph)
        one_pass = Pass(self.model, self._projected_forward, (inputs, labels), reached, projected, create_graph)
        factors, failures = find_factors(one_pass, self.ownership.paths())
        # In the precision of the parameters, float32 at least.
        dtypes = [parameter.dtype for parameter in self.ownership.parameters.values()]
        kept_outputs = (outputs if create_graph else outputs.detach()).to(reduce(torch.promote_types, dtypes, torch.float32))
        return PerSampleJacobian(factors, self.shapes, kept_outputs, projected.shape[1]), failures

    def _projected_forward(self, batch: tuple[Any, Tensor | None]) -> Tensor:
        inputs, labels = batch
        return self.directions.project(_read_outputs(self._forward(inputs)), labels, checked=True)

    def _failures(self, inputs: Any, labels: Tensor | None) -> dict[str, str]:
        """Return the parameters whose path fails or disagrees with autograd, each with the reason."""
        torch.manual_seed(0)
        jacobian, failures = self._jacobian(inputs, labels, create_graph=False)
        reference, weight = self._reference(inputs, labels)
        found = jacobian.weighted_sum(weight.to(jacobian.outputs.dtype).unsqueeze(2))
        # In half precision autograd's own sums are that coarse.
        tolerance = max(CHECK_TOLERANCE, 8 * torch.finfo(weight.dtype).eps)
        errors = _relative_errors(found, reference)
        if any(not error <= tolerance for error in errors.values()):
            # oneDNN adds up the gradient of a convolution's bias so coarsely that it is off by more on large images.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of settings for other devices, which `flags` touches too.
                with torch.backends.mkldnn.flags(enabled=False):
                    again = _relative_errors(found, self._reference(inputs, labels)[0])
            errors = {name: min(error, again[name]) if error == error else error for name, error in errors.items()}
        wrong = {name: str(error) for name, error in failures.items()}
        for name, error in errors.items():
            if not error <= tolerance:
                wrong.setdefault(name, f"relative error {error:.1e} against autograd")
        return wrong

    def _reference(self, inputs: Any, labels: Tensor | None) -> tuple[dict[str, Tensor | None], Tensor]:
        """Return Σ_i G(x_i) R_i by autograd, and the weights R, shape (B, d)."""
        torch.manual_seed(0)
        projected = self._projected_forward((inputs, labels))
        # Weights that are the same for every sample would miss a wrong batch axis.
        weight = torch.randn(projected.shape, generator=torch.Generator().manual_seed(1)).to(projected)
        parameters = self.ownership.parameters
        found = torch.autograd.grad(projected, list(parameters.values()), weight, allow_unused=True)
        return dict(zip(parameters, found, strict=True)), weight

    def _demote(self, failures: Mapping[str, str]) -> None:
        for name, reason in failures.items():
            path = self.ownership.path(name)
            logger.debug("`%s`: not by %s of `%s`: %s", name, path.method.value, type(path.module).__name__, reason)
            if not self.ownership.demote(name):
                raise expected(
                    "model",
                    "one whose outputs are a function of each sample alone",
                    f"a gradient of `{name}` that no method reproduces ({reason})",
                    "Check for randomness in the forward pass, or leave the parameter out by `parameters=`.",
                )


def per_sample_jacobian(
    model: nn.Module,
    inputs: Any,
    directions: DirectionsLike = "all",
    parameters: str | Iterable[str] = "trainable",
    *,
    forward: Callable[[Any], Any] | None = None,
    seed: int = 0,
    create_graph: bool = False,
) -> PerSampleJacobian:
    """Differentiate the outputs of a model with respect to its parameters, sample by sample: G(x_i) = ∂(Vᵀf)(x_i)/∂θ.

    For many batches of one model, make a `JacobianOperator` once: it looks at the model only the first time.

    Args:
        model: the model, in eval mode if it has batch norm.
        inputs: a batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        directions: see `Directions`; default all outputs, V = identity.
        parameters: ``"trainable"``, or names of parameters or of modules.
        forward: inputs -> outputs (B, D), where it is not a plain call of the model.
        seed: seed of random directions.
        create_graph: keep the graph, so that the result can be differentiated again.

    Returns:
        the Jacobian of B samples, d directions and P parameters, in factored form.

    Raises:
        ValueError: if the output is not (B, D) or has no gradient, depends on the other samples of the batch, or has fewer
            components than directions are asked for; or if the model has no trainable parameter.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 2.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> jacobian = per_sample_jacobian(model, torch.randn(5, 3))
        >>> jacobian.gram().shape, jacobian.materialize().shape
        (torch.Size([5, 2, 2]), torch.Size([5, 2, 26]))
    """
    operator = JacobianOperator(model, forward, directions, parameters, seed, create_graph)
    return operator(inputs)


def _complete(found: tuple[PerSampleJacobian, dict[str, Exception]]) -> PerSampleJacobian:
    """Return the Jacobian if no path failed."""
    jacobian, failures = found
    for name, error in failures.items():
        raise expected("model", f"differentiable by sample in `{name}` on every batch alike", f"{error}") from error
    return jacobian


@contextmanager
def _exact(model: nn.Module, create_graph: bool) -> Iterator[None]:
    with differentiable(model), plain_attention() if create_graph else nullcontext():
        yield


def _call(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a batch as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _read_outputs(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.is_floating_point():
        return outputs
    got = f"shape {tuple(outputs.shape)} of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise expected("outputs", "a floating-point tensor of shape (B, D)", got, _OUTPUT_REMEDY)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise expected(
                "model",
                "one whose output for a sample does not depend on the rest of the batch",
                f"batch norm `{name}` using batch statistics",
                "Call `model.eval()`, or use running statistics or another norm.",
            )


def _refuse_interaction(apart: Tensor, together: Tensor) -> None:
    finite = torch.isfinite(apart) & torch.isfinite(together)
    apart, together = apart[finite], together[finite]
    if not together.numel():
        return
    scale = together.abs().max().clamp_min(torch.finfo(together.dtype).tiny)
    change = float((apart - together).abs().max() / scale)
    if change > max(1e-3, 8 * torch.finfo(together.dtype).eps):
        raise expected(
            "model",
            "one whose output for a sample does not depend on the rest of the batch",
            f"outputs that change by {change:.1%} when half of the batch is taken away",
            "Remove what mixes samples (batch statistics, attention or normalization across the batch).",
        )


def _relative_errors(found: Mapping[str, Tensor], reference: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Return ‖found − reference‖ over ‖reference‖, which counts as at least 1e-2 of the largest one."""
    norms = {name: 0.0 if value is None else float(value.double().norm()) for name, value in reference.items()}
    largest = max(norms.values())
    errors = {}
    for name, value in reference.items():
        got = found[name][0].double() if name in found else torch.zeros(())
        wanted = torch.zeros_like(got) if value is None else value.double()
        floor = 1e-2 * largest if value is None else max(norms[name], 1e-2 * largest)
        errors[name] = float((got.to(wanted.device) - wanted).norm()) / floor if floor else float(got.norm())
    return errors
