"""What all mixins share: add terms to the loss that a training step returns."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_class
from torch import Tensor, nn

from lightning_netsim._checks import NetsimError, check_positive_int, expected
from lightning_netsim.data import trees
from lightning_netsim.data.batches import find_views, run_model, split_batch
from lightning_netsim.mixins.optimizers import adding_parameters
from lightning_netsim.mixins.schedule import Schedule, ScheduleLike

#: Computes the term once the step has run.
Term = Callable[[], Tensor]
#: The key of the mark in the place of a hyperparameter that a checkpoint cannot hold.
NOT_SAVED = "not_saved"


class AbstractRegularizer(ABC):
    """One term of the loss: when it is due, and how it is computed around a training step.

    Args:
        name: the prefix of its settings; it is logged as ``netsim/<name>_loss``.
        weight: of the term, see `Schedule`.
        every_n_steps: add it to every n-th optimizer step only.
    """

    def __init__(self, name: str, weight: ScheduleLike, every_n_steps: int) -> None:
        self.name = name
        self.weight = Schedule(weight, f"{name}_weight")
        self.every_n_steps = check_positive_int(f"{name}_every_n_steps", every_n_steps)

    def is_due(self, step: int) -> bool:
        """Return whether the term is added at an optimizer step; one with weight 0 is not computed."""
        return step % self.every_n_steps == 0 and self.weight(step) != 0

    #: Of the criterion's own parameters; None for that of the first group of the optimizer.
    learning_rate: float | None = None
    #: Whether the optimizers know these parameters.
    is_prepared = False
    #: Whether it watches the batch as it comes from the loader, and not the part that the training step gets.
    sees_whole_batch = False

    def part_for_step(self, batch: Any) -> Any:
        """Return the part of a batch that the training step and all other regularizers get."""
        return batch

    def criterion(self, module: LightningModule) -> Any:
        """Return the criterion that a module has at the time."""
        return getattr(module, f"{self.name}_criterion")

    def prepare(self, module: LightningModule) -> None:
        """Check, before training begins, what can be known then."""
        return

    @abstractmethod
    def watch(self, module: RegularizedModule, batch: Any, batch_idx: int) -> AbstractContextManager[Term]:
        """Record, while the training step runs inside the block, what the term needs; yield what computes it afterwards."""


class RegularizedModule(LightningModule):
    """A LightningModule whose training step, wherever its class has it from, returns the loss with terms added.

    The mixins derive from it. They stand left of the LightningModule whose step they extend, or alone: their subclass may
    define `training_step` itself.
    """

    is_mixin: ClassVar[bool] = True
    """Whether a class only brings a term, and is no module of its own."""
    trains_alone: ClassVar[bool] = False
    """Whether the term is all that a module needs to be trained by: then it may do without a training step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("is_mixin", False):
            return
        cls.is_mixin = False
        _refuse_wrong_order(cls)
        # What stands in for a training step does not count as one.
        steps = (base.__dict__["training_step"] for base in cls.__mro__ if "training_step" in base.__dict__)
        step = next(step for step in steps if getattr(step, "__wrapped__", None) is not _default_training_step)
        if step is LightningModule.training_step and cls.trains_alone:
            step = _default_training_step
        if step is not LightningModule.training_step and not hasattr(step, "_adds_terms"):
            cls.training_step = _adding_terms(step)  # type: ignore[method-assign]
        optimizers = cls.configure_optimizers
        if optimizers is not LightningModule.configure_optimizers and not hasattr(optimizers, "_adds_parameters"):
            cls.configure_optimizers = adding_parameters(optimizers)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._regularizers: list[AbstractRegularizer] = []
        self._is_stepping = False
        #: Whether the training step itself runs, and not what a regularizer does before or after it.
        self._is_watched = False

    @property
    def automatic_optimization(self) -> bool:
        """Whether Lightning calls the optimizer; it has to, or nothing would use the loss that is returned.

        Raises:
            ValueError: where it is set to False.
        """
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, automatic_optimization: bool) -> None:
        if not automatic_optimization:
            raise _manual_optimization()
        self._automatic_optimization = True

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Save hyperparameters as Lightning does, criteria as their class and arguments.

        A checkpoint holds plain values: an argument that has no such form, as a function, is marked as missing, and has to be
        given again to `load_from_checkpoint`.
        """
        caller = inspect.currentframe()
        kwargs.setdefault("frame", None if caller is None else caller.f_back)
        mixins = [base for base in type(self).__mro__ if base.__dict__.get("is_mixin") and "__init__" in base.__dict__]
        arguments = [each for mixin in mixins for each in inspect.signature(mixin.__dict__["__init__"]).parameters.values()]
        ours = [argument.name for argument in arguments if argument.kind is inspect.Parameter.KEYWORD_ONLY]
        with warnings.catch_warnings():  # Criteria do not stay modules there, and what cannot be pickled is marked.
            warnings.filterwarnings("ignore", "Attribute '\\w+' is an instance of `nn.Module`")
            warnings.filterwarnings("ignore", f"Attribute '({'|'.join(ours)})' removed from hparams")
            super().save_hyperparameters(*args, **kwargs)
        for held in (vars(self)["_hparams"], vars(self)["_hparams_initial"]):
            held.update({name: plain(value) for name, value in held.items() if name in ours or _is_criterion(value)})

    def _keep_hyperparameters(self, **given: Any) -> None:
        """Put arguments in the place of those that `save_hyperparameters` has dropped, where it has saved those beside them.

        Raises:
            ValueError: if one comes from a checkpoint that could not hold it.
        """
        for held in (vars(self).get("_hparams", {}), vars(self).get("_hparams_initial", {})):
            if any(name in held for name in given) and "_instantiator" not in held:  # LightningCLI keeps its own, complete.
                held.update({name: plain(value) for name, value in given.items()})
        for name, value in given.items():
            check_saved(name, value)

    def _step_with_terms(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiler_ctx is not None:
            remedy = "Compile the network inside it instead: `self.network = torch.compile(self.network)`."
            raise expected("model", "an uncompiled module under a regularizing mixin", "one compiled as a whole", remedy)
        if not self.automatic_optimization:  # An attribute of the class has no setter.
            raise _manual_optimization()
        whole = args[0] if args else kwargs.get("batch")
        batch_idx = int(args[1] if len(args) > 1 else kwargs.get("batch_idx", 0))
        if isinstance(whole, Iterator):
            wanted = "one that is called with a batch, under a regularizing mixin"
            raise expected("training_step", wanted, "`dataloader_iter`", "Let the step take (batch, batch_idx).")
        batch = functools.reduce(lambda part, regularizer: regularizer.part_for_step(part), self._regularizers, whole)
        args, kwargs = (batch, *args[1:]) if args else args, kwargs if args else {**kwargs, "batch": batch}
        due = [regularizer for regularizer in self._regularizers if regularizer.is_due(self.global_step)]
        if not torch.is_grad_enabled():  # Validation that runs the training step.
            due = []
        for regularizer in due:
            if regularizer.learning_rate is not None and self._trainer is not None and not regularizer.is_prepared:
                got = f"{regularizer.learning_rate} where `configure_optimizers` has been replaced, as by `--optimizer`"
                raise expected(f"{regularizer.name}_learning_rate", "None", got, "Define `configure_optimizers` in the module.")
        with ExitStack() as stack:
            watched = [each.watch(self, whole if each.sees_whole_batch else batch, batch_idx) for each in due]
            terms = list(zip(due, map(stack.enter_context, watched), strict=True))
            self._is_watched = True
            try:
                result = step(self, *args, **kwargs)
            finally:
                self._is_watched = False
        if result is None or (isinstance(result, Mapping) and "loss" not in result):  # Skipped, or Lightning's to refuse.
            return result
        loss = result["loss"] if isinstance(result, Mapping) else result
        # Data-parallel training wants a gradient of every parameter of a criterion, also where its term is not due.
        criteria = [regularizer.criterion(self) for regularizer in self._regularizers]
        for criterion in criteria:
            parameters = criterion.parameters() if isinstance(criterion, nn.Module) else ()
            loss = loss + sum((parameter.sum() * 0 for parameter in parameters if parameter.requires_grad), 0.0)
        for regularizer, compute in terms:
            term, weight = compute(), regularizer.weight(self.global_step)
            loss = loss + weight * term.to(loss)
            self.log(f"netsim/{regularizer.name}_loss", term.detach())
            if not regularizer.weight.is_constant:
                self.log(f"netsim/{regularizer.name}_weight", weight)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss


def plain(value: Any) -> Any:
    """Return a hyperparameter in a form that any loader of checkpoints can read; a mark in the place of what has none."""
    if _is_criterion(value):
        value = value.config()
    if callable(value):
        return {NOT_SAVED: getattr(value, "__qualname__", type(value).__name__)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def _is_criterion(value: Any) -> bool:
    """Return whether a value is a module that knows its class and arguments as plain values."""
    return isinstance(value, nn.Module) and callable(getattr(value, "config", None))


def check_saved(name: str, value: Any) -> None:
    """Refuse a hyperparameter of a checkpoint that could not hold it."""
    if isinstance(value, Mapping):
        if NOT_SAVED in value:
            got = f"a checkpoint that could not hold `{value[NOT_SAVED]}`"
            raise expected(name, "given again", got, f"Load with `load_from_checkpoint(path, {name}=...)`.")
        for entry in value.values():
            check_saved(name, entry)
    elif isinstance(value, list):
        for entry in value:
            check_saved(name, entry)


def made_criterion(name: str, criterion: Any, wanted: str) -> Callable[..., Any] | None:
    """Return a criterion, made from its class and arguments where a checkpoint or a file gives these; None for None.

    Args:
        name: what messages call it.
        criterion: the criterion, or its ``config()``.
        wanted: what it has to be.

    Raises:
        ValueError: if it is neither, or a checkpoint could not hold it.
    """
    check_saved(name, criterion)
    if isinstance(criterion, Mapping):
        criterion = instantiate_class((), dict(criterion))
    if criterion is not None and (not callable(criterion) or isinstance(criterion, type)):
        got = f"the class {criterion.__name__}" if isinstance(criterion, type) else repr(criterion)
        raise expected(name, wanted, got)
    made: Callable[..., Any] | None = criterion
    return made


def _manual_optimization() -> NetsimError:
    remedy = "With manual optimization, compute a criterion of `lightning_netsim.losses` in your step and add it there."
    return expected("automatic_optimization", "True under a regularizing mixin", "False", remedy)


def _adding_terms(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a training step that adds the terms; inside another such step, as by `super()`, it is the step alone."""

    @functools.wraps(step)
    def training_step(self: RegularizedModule, *args: Any, **kwargs: Any) -> Any:
        if self._is_stepping:
            return step(self, *args, **kwargs)
        self._is_stepping = True
        try:
            return self._step_with_terms(step, args, kwargs)
        finally:
            self._is_stepping = False

    training_step._adds_terms = True  # type: ignore[attr-defined]
    return training_step


def _default_training_step(self: RegularizedModule, batch: Any, batch_idx: int) -> Tensor:
    """Run the module on the inputs of a batch, on all their views at once, and return zero: the terms are the loss."""
    inputs = split_batch(batch)[0]
    views = find_views(inputs)
    found = trees.tensors(run_model(self, torch.cat(views) if views else inputs))
    # An output that no term looks at may hold NaN.
    return sum(
        (part.nan_to_num(0, 0, 0).sum() * 0 for part in found if part.requires_grad), torch.zeros((), device=self.device)
    )


def _refuse_wrong_order(cls: type[RegularizedModule]) -> None:
    """Refuse a mixin to the right of a module: that module's constructor would not know its arguments."""
    mro = cls.__mro__
    for place, mixin in enumerate(mro):
        if not (issubclass(mixin, RegularizedModule) and mixin.__dict__.get("is_mixin")) or mixin is RegularizedModule:
            continue
        for before in mro[1:place]:
            own = issubclass(before, mixin) or (issubclass(before, RegularizedModule) and before.is_mixin)
            if issubclass(before, LightningModule) and not own:
                bases = ", ".join(base.__name__ for base in cls.__bases__)
                remedy = f"Write `class {cls.__name__}({mixin.__name__}, {before.__name__})`."
                raise expected(f"{cls.__name__}", f"a class with {mixin.__name__} left of {before.__name__}", bases, remedy)
