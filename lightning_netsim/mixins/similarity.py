"""Enforce similarity while a LightningModule trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_netsim._checks import expected
from lightning_netsim.data.batches import (
    HasSimilarityStep,
    SimilarityBatch,
    find_outputs,
    read_batch,
    run_model,
    split_batch,
)
from lightning_netsim.data.labels import class_numbers
from lightning_netsim.data.trees import tensors
from lightning_netsim.jacobian import Directions, JacobianOperator, PerSampleJacobian
from lightning_netsim.jacobian.capture import Call, differentiable
from lightning_netsim.jacobian.isolation import muted, unchanged
from lightning_netsim.losses import AbstractSimilarityLoss, GradientBatch, GroupSimilarityLoss
from lightning_netsim.mixins.regularized import AbstractRegularizer, RegularizedModule, Term, made_criterion
from lightning_netsim.mixins.schedule import ScheduleLike

# The modules that draw dropout themselves.
_DROPOUT = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)

#: What a criterion is: gradients of a batch in, a scalar out. (jsonargparse would take a callable that returns a Tensor for one
#: that makes an object of class Tensor.)
Criterion = AbstractSimilarityLoss | Callable[..., Any]


class SimilarityMixin(RegularizedModule):
    """Add weight · criterion to the loss of a LightningModule: tell it which inputs are to be the same to it.

    ``class Mine(SimilarityMixin, MyModule)`` adds the term to the training step of ``MyModule``; a class that derives from
    `SimilarityMixin` alone may define its own. Gradients come from the forward pass of the step itself: its call of the module
    on the inputs of the batch. Otherwise a second forward pass is run, and said so once: where the module has train-mode batch
    norm (with its running statistics then, as samples must not depend on each other), under autocast (in float32), where parts
    of it are compiled (eagerly, as compiled code cannot be differentiated twice), where it has dropout and a layer whose
    gradients are not known in factored form, such as `MultiheadAttention`, where it defines `similarity_step`, and where the
    step does not call the module on the inputs of its batch. Attention runs by its math kernel during such steps:
    fused kernels cannot be differentiated twice. No second pass draws dropout.

    Labels are those of the batch, as `SimilarityMonitor` reads it; a sample with a negative label belongs to no class. Under
    DDP every process compares the samples of its own batch; what is averaged is the term of each process, not the criterion of
    the joint batch. The unweighted term is logged as ``netsim/similarity_loss``: minus the mean similarity for criteria of
    pairs and groups.

    Args:
        args: passed on.
        criterion: what is minimized, a module of `lightning_netsim.losses` or a function of a `GradientBatch`; by default
            `GroupSimilarityLoss`: all samples of a label are to be similar.
        similarity_weight: the weight: a number, points [step, weight] joined by straight lines, or a function of the step.
            Where it is 0, nothing is computed.
        similarity_directions: which functions of the outputs are differentiated, see `Directions`: "contrast", a number of
            shared random directions, "all", "target", ...; by default those of the criterion: "contrast" where samples of
            one class are compared, else 1.
        similarity_parameters: "trainable", or names of parameters or modules; the last layer alone is nearly free.
        similarity_every_n_steps: add the term to every n-th optimizer step only.
        similarity_seed: seed of random directions.
        kwargs: passed on.

    Raises:
        ValueError: for a value out of range, a mixin to the right of the module in the bases, manual optimization; at the first
            step for missing labels, or a model whose gradients cannot be told apart by sample.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 5 of the
    supplementary material.

    Example:
        >>> from lightning_netsim.demos import ImageClassifier
        >>> class SimilarDigits(SimilarityMixin, ImageClassifier):
        ...     "Digits of one class are to be the same."
        >>> model = SimilarDigits(network="digits", similarity_weight=0.1)
        >>> loss = model.training_step((torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])), 0)
    """

    is_mixin = True

    def __init__(
        self,
        *args: Any,
        criterion: Criterion | None = None,
        similarity_weight: ScheduleLike = 0.1,
        similarity_directions: int | str | None = None,
        similarity_parameters: str | list[str] = "trainable",
        similarity_every_n_steps: int = 1,
        similarity_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._keep_hyperparameters(criterion=criterion, similarity_weight=similarity_weight)
        wanted = "a module of `lightning_netsim.losses`, or a function of a GradientBatch"
        self.similarity_criterion: Criterion = made_criterion("criterion", criterion, wanted) or GroupSimilarityLoss()
        regularizer = SimilarityRegularizer(
            similarity_weight,
            similarity_every_n_steps,
            directions=similarity_directions,
            parameters=similarity_parameters,
            seed=similarity_seed,
        )
        self._regularizers.append(regularizer)


class SimilarityRegularizer(AbstractRegularizer):
    """The term of `SimilarityMixin`: the `similarity_criterion` that the module has at the time.

    Args:
        weight: of the term.
        every_n_steps: how often it is added.
        directions: which functions of the outputs are differentiated; None to choose by the labels.
        parameters: of which the gradients are compared.
        seed: of random directions.
    """

    def __init__(
        self,
        weight: ScheduleLike,
        every_n_steps: int,
        *,
        directions: int | str | None,
        parameters: str | list[str],
        seed: int,
    ) -> None:
        super().__init__("similarity", weight, every_n_steps)
        self._directions, self._parameters, self._seed = directions, parameters, seed
        if directions is not None:
            Directions(directions, seed)
        self._operator: JacobianOperator | None = None
        self._prepared_for: list[int] = []
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the operator behind: a copy of the module, as for averaged weights, needs one of its own."""
        return {**vars(self), "_operator": None, "_prepared_for": []}

    @contextmanager
    def watch(self, module: RegularizedModule, batch: Any, batch_idx: int) -> Iterator[Term]:
        run = _Run(module, batch, batch_idx)
        # Made anew where other parameters are trained than before, as after a backbone is unfrozen.
        trained = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
        if self._operator is None or trained != self._prepared_for:
            self._operator, self._prepared_for = self._prepare(run), trained
        operator, criterion = self._operator, self.criterion(module)
        reason = _why_run_again(module, operator)
        with nullcontext() if reason else run.watched(operator):
            yield lambda: criterion(self._gradients(run, operator, reason))

    def _prepare(self, run: _Run) -> JacobianOperator:
        """Return the operator, after a look at the model on a few samples that leaves it as it was."""
        module = run.module

        def forward(inputs: Any) -> Tensor:
            with alone(module):
                if isinstance(module, HasSimilarityStep):
                    return read_batch(module, inputs).outputs
                return find_outputs(run_model(module, inputs))

        with isolate_rng(), unchanged(module), alone(module):
            seen = run.looked_at()
            labels, directions = class_numbers(seen.labels), self._directions
            if directions is None:
                # Those of the criterion; one at random without labels, or without another output to contrast with.
                can_contrast = labels is not None and seen.outputs.shape[1] > 1
                directions = getattr(module.similarity_criterion, "directions", 1) if can_contrast else 1
            operator = JacobianOperator(module, forward, directions, self._parameters, self._seed, create_graph=True)
            operator.prepare(run.inputs, labels)
        return operator

    def _gradients(self, run: _Run, operator: JacobianOperator, reason: str) -> GradientBatch:
        captured = None if reason else run.captured()
        if captured is not None:
            return run.gradients(operator, captured)
        reason = reason or "the training step does not call the module once on the inputs of its batch"
        if reason not in self._said:
            self._said.add(reason)
            rank_zero_info(f"SimilarityMixin runs a second forward pass where it is due, because {reason}.")
        with alone(run.module), operator.watch() as run.calls:
            seen = run.again()
        return run.gradients(operator, seen)


class _Run:
    """One training step: what the module was called with, and what its layers saw.

    Args:
        module: the module.
        batch: what the step is called with.
        batch_idx: its number.
    """

    def __init__(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.module, self.batch, self.batch_idx = module, batch, batch_idx
        self.inputs = batch if isinstance(module, HasSimilarityStep) else split_batch(batch)[0]
        self.calls: dict[nn.Module, list[Call]] = {}
        self._outputs: list[tuple[Any, Any]] = []

    @contextmanager
    def watched(self, operator: JacobianOperator) -> Iterator[None]:
        """Record the calls of the module and of its layers inside the block."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._outputs.append(((args, kwargs), output))

        handle = self.module.register_forward_hook(hook, with_kwargs=True)
        try:
            with operator.watch() as self.calls:
                yield
        finally:
            handle.remove()

    def captured(self) -> SimilarityBatch | None:
        """Return what the step's own call of the module gave; None if it was not one call on the inputs of the batch."""
        if len(self._outputs) != 1:
            return None
        arguments, output = self._outputs[0]
        given, held = ({id(tensor) for tensor in tensors(tree)} for tree in (arguments, self.inputs))
        if not given or not given <= held:
            return None
        outputs = find_outputs(output)
        # A pass without a graph, as for pseudo-labels, is not the one that is trained by.
        return SimilarityBatch(outputs, split_batch(self.batch)[1]) if outputs.requires_grad else None

    def again(self) -> SimilarityBatch:
        """Run the module on the batch once more."""
        return read_batch(self.module, self.batch, self.batch_idx)

    def looked_at(self) -> SimilarityBatch:
        """Run the module on the batch for the first time.

        Raises:
            ValueError: if it does not take the inputs of the batch as they are.
        """
        try:
            return self.again()
        except (TypeError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            remedy = "Define `similarity_step(batch, batch_idx)` that returns a `SimilarityBatch`."
            wanted = "a function of the inputs of a batch, as it stands in (inputs, labels)"
            raise expected("forward", wanted, f"{type(error).__name__}: {reason}", remedy) from error

    def gradients(self, operator: JacobianOperator, seen: SimilarityBatch) -> GradientBatch:
        """Return the gradients of the outputs that were seen."""
        labels = class_numbers(seen.labels)

        def compute() -> PerSampleJacobian:
            with alone(self.module):
                return operator.read(self.calls, seen.outputs, self.inputs, labels)

        return GradientBatch(operator, self.inputs, labels, compute)


@contextmanager
def alone(module: LightningModule) -> Iterator[None]:
    """Let a module run beside its training step: in full precision, eagerly, unlogged, norms and dropout as in evaluation."""
    frozen = [part for part in module.modules() if isinstance(part, (_BatchNorm, *_DROPOUT)) and part.training]
    with differentiable(module), muted(module, LightningModule):
        for part in frozen:
            part.training = False
        try:
            yield
        finally:
            for part in frozen:
                part.training = True


def _why_run_again(module: LightningModule, operator: JacobianOperator) -> str:
    """Return why the forward pass of the training step will not do; nothing where it will."""
    if isinstance(module, HasSimilarityStep):
        return "`similarity_step` says what is compared"
    if torch.is_autocast_enabled(module.device.type):
        return "gradients of outputs are taken in float32, not under autocast"
    in_training = [part for part in module.modules() if isinstance(part, _DROPOUT) and part.training]
    # A recurrent layer and attention call it `dropout`.
    probabilities = [getattr(part, "p", getattr(part, "dropout", 0.0)) for part in in_training]
    draws_dropout = any(isinstance(each, float) and each > 0 for each in probabilities)
    if draws_dropout and set(operator.ownership.methods()) != {"layer"}:
        return "some gradients come from running a part of the module again, which would draw other dropout; none is drawn then"
    for part in module.modules():
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            return "samples depend on each other through batch norm in training mode; its running statistics are used instead"
        compiled_in_place = part._compiled_call_impl is not None or hasattr(part.forward, "_torchdynamo_orig_callable")
        if isinstance(part, OptimizedModule) or compiled_in_place:
            return "compiled code cannot be differentiated twice; it is run eagerly"
    return ""
