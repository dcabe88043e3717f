"""How other packages count the same neighbors in O(P) memory, or form the same matrix of similarities.

Each function prepares a package for a problem, which is not timed, and returns what is. All are used as their documentation
shows, and in their favor where there is a choice; `counting` has the ways of torch itself.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.counting import Gradients, from_gradients
from benchmarks.problems import Problem

Way = Callable[[], Tensor]


def backpack(problem: Problem) -> Way:
    """Take two passes of BackPACK's `BatchGrad`, which gets the rule for PReLU that it lacks.

    Its refusal without the rule is not counted against it: its documentation shows how a user adds one.
    """
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import BatchGrad

    network = extend(copy.deepcopy(problem.network))
    extension = BatchGrad()
    extension.set_module_extension(nn.PReLU, _prelu_rule(squared=False))

    def chunks() -> Iterable[Gradients]:
        for chunk in problem.chunks():
            with active(extension):
                (network(chunk) @ problem.direction).sum().backward()
            yield {name: parameter.grad_batch for name, parameter in network.named_parameters()}
            for parameter in network.parameters():
                parameter.grad = parameter.grad_batch = None

    return lambda: from_gradients(problem, (chunks(), chunks()))


def backpack_norms(problem: Problem) -> Way:
    """Take the norms from BackPACK's `BatchL2Grad`, S from a weighted backward pass, and the products from `BatchGrad`.

    So the gradients of single images are formed in the second pass only.
    """
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import BatchGrad, BatchL2Grad

    network = extend(copy.deepcopy(problem.network))
    squared, single = BatchL2Grad(), BatchGrad()
    squared.set_module_extension(nn.PReLU, _prelu_rule(squared=True))
    single.set_module_extension(nn.PReLU, _prelu_rule(squared=False))
    parameters = list(network.parameters())

    def way() -> Tensor:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        norms, counts = [], []
        for chunk in problem.chunks():
            values = (network(chunk) @ problem.direction)[:, 0]
            with active(squared):
                values.sum().backward(retain_graph=True)
            norms.append(torch.stack([parameter.batch_l2 for parameter in parameters]).sum(0).sqrt())
            for summed, weighted in zip(total, torch.autograd.grad(values, parameters, 1 / norms[-1]), strict=True):
                summed += weighted
            for parameter in parameters:
                parameter.grad = parameter.batch_l2 = None
        for chunk, norm in zip(problem.chunks(), norms, strict=True):
            with active(single):
                (network(chunk) @ problem.direction).sum().backward()
            products = [p.grad_batch.flatten(1) @ s.flatten() for p, s in zip(parameters, total, strict=True)]
            counts.append(torch.stack(products).sum(0) / norm)
            for parameter in parameters:
                parameter.grad = parameter.grad_batch = None
        return torch.cat(counts)

    return way


def _prelu_rule(squared: bool) -> Any:
    """Return the rule by which BackPACK finds the gradient of each image for a PReLU of one slope, or its square."""
    from backpack.extensions.firstorder.base import FirstOrderModuleExtension

    class Rule(FirstOrderModuleExtension):  # type: ignore[misc]
        def weight(self, extension: Any, module: nn.PReLU, g_inp: Any, g_out: tuple[Tensor], quantities: None) -> Tensor:
            single = (g_out[0] * module.input0.clamp_max(0)).flatten(1).sum(1, keepdim=True)
            return single.square().squeeze(1) if squared else single

    return Rule(params=["weight"])


def opacus(problem: Problem) -> Way:
    """Take two passes of Opacus' `GradSampleModule`, in training mode, without which it records nothing.

    It refuses batch norm, which in training mode mixes the images of a batch and has buffers; here batch norm is rewritten
    as the affine map that it is in evaluation mode.
    """
    from opacus import GradSampleModule

    network = GradSampleModule(without_batch_norm(problem.network).train(), loss_reduction="sum")
    names = [name for name, _ in problem.network.named_parameters()]

    def chunks() -> Iterable[Gradients]:
        for chunk in problem.chunks():
            (network(chunk) @ problem.direction).sum().backward()
            yield dict(zip(names, (parameter.grad_sample for parameter in network.parameters()), strict=True))
            network.zero_grad()

    return lambda: from_gradients(problem, (chunks(), chunks()))


def opacus_as_given(problem: Problem) -> Way:
    """Hand the network to Opacus as it is, in evaluation mode: what it says to batch norm."""
    from opacus import GradSampleModule

    GradSampleModule(copy.deepcopy(problem.network), loss_reduction="sum")
    return opacus(problem)


class FrozenBatchNorm(nn.Module):
    """Batch norm in evaluation mode, whatever the mode: an affine map, its statistics constants and no buffers.

    Args:
        norm: the layer whose statistics and parameters are taken.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("Expected `norm` to have running statistics, but got none.")
        self.statistics = (norm.running_mean.clone(), norm.running_var.clone())
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (B, C, H, W)."""
        return nn.functional.batch_norm(x, *self.statistics, self.weight, self.bias, eps=self.eps)


def without_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy in which each batch norm is a `FrozenBatchNorm`."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm(child))
    return network


def captum(problem: Problem, sample_wise: bool = False) -> Way:
    """Take Captum's `TracInCP`: its influence is the dot product of loss gradients, and it can sum over the test set.

    With the loss w_i · (f(x_i)·v) and the weight w_i as label, self-influence at w = 1 gives ‖g_i‖², and the aggregate
    influence at w = 1/‖g_i‖, divided by nothing more, is N_S: three passes in O(P) memory. The loop over samples is the only
    mode that is right for all layers; `sample_wise=True` supports convolutions and linear layers.
    """
    from captum.influence import TracInCP

    def loss(outputs: Tensor, weights: Tensor) -> Tensor:
        values = (outputs @ problem.direction)[:, 0] * weights
        return values.sum() if sample_wise else values

    loss.reduction = "sum" if sample_wise else "none"  # type: ignore[attr-defined]
    network, inputs = copy.deepcopy(problem.network), problem.inputs()

    def tracin(weights: Tensor) -> tuple[Any, DataLoader[Any]]:
        # One by one, each image is differentiated alone, instead of through the graph of the whole batch: ten times as fast.
        loader = DataLoader(TensorDataset(inputs, weights), batch_size=problem.chunk_size if sample_wise else 1)
        # No checkpoint is loaded: the network has its weights. The number returned is the learning rate.
        options = {"checkpoints_load_func": lambda model, path: 1.0, "sample_wise_grads_per_batch": sample_wise}
        return TracInCP(network, loader, checkpoints=["as it is"], loss_fn=loss, **options), loader

    def way() -> Tensor:
        instance, _ = tracin(torch.ones(len(inputs)))
        norms = instance.self_influence().sqrt()
        instance, loader = tracin(1 / norms)
        counts: Tensor = instance.influence(loader, aggregate=True)[0]
        return counts

    return way


def captum_sample_wise(problem: Problem) -> Way:
    """Take the fast mode of Captum's `TracInCP`."""
    return captum(problem, sample_wise=True)


def dattri(problem: Problem, batch_size: int, hidden_projection: bool = False) -> Way:
    """Take dattri's exact Grad-Cos: the matrix of all similarities, shape (N, N).

    `projector_kwargs=None` is documented as no projection, but leaves the default projection to 512 numbers in place; the
    attribute has to be emptied afterwards.

    Args:
        problem: the problem.
        batch_size: the gradients of the test set are formed anew for each batch of the training set, so that greater batches
            are faster, and hold the gradients of twice as many images.
        hidden_projection: leave the projection in place.
    """
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def value(parameters: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        return (functional_call(network, parameters, (data[0].unsqueeze(0),)) @ problem.direction)[0, 0]

    network = copy.deepcopy(problem.network)
    task = AttributionTask(value, network, {name: tensor.clone() for name, tensor in network.state_dict().items()})
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=True, projector_kwargs=None)
    if not hidden_projection:
        attributor.projector_kwargs = None
    loader = DataLoader(TensorDataset(problem.inputs()), batch_size=batch_size)

    def way() -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            similarity: Tensor = attributor.attribute(loader, loader)
        return similarity

    return way
