"""What all mixins share: add terms to the loss that a training step returns."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_netsim._checks import check_positive_int, expected
from lightning_netsim.losses import AbstractSimilarityLoss
from lightning_netsim.mixins.schedule import Schedule, ScheduleLike

#: Computes the term once the step has run.
Term = Callable[[], Tensor]


class AbstractRegularizer(ABC):
    """One term of the loss: when it is due, and how it is computed around a training step.

    Args:
        name: the prefix of its settings; it is logged as ``netsim/<name>_loss``.
        weight: of the term, see `Schedule`.
        every_n_steps: add it to every n-th optimizer step only.
    """

    def __init__(self, name: str, weight: ScheduleLike, every_n_steps: int) -> None:
        self.name = name
        self.weight = Schedule(weight)
        self.every_n_steps = check_positive_int(f"{name}_every_n_steps", every_n_steps)

    def is_due(self, step: int) -> bool:
        """Return whether the term is added at an optimizer step; one with weight 0 is not computed."""
        return step % self.every_n_steps == 0 and self.weight(step) != 0

    @abstractmethod
    def watch(self, module: LightningModule, batch: Any, batch_idx: int) -> AbstractContextManager[Term]:
        """Record, while the training step runs inside the block, what the term needs; yield what computes it afterwards."""


class RegularizedModule(LightningModule):
    """A LightningModule whose training step, wherever its class has it from, returns the loss with terms added.

    The mixins derive from it. They stand left of the LightningModule whose step they extend, or alone: their subclass may
    define `training_step` itself.
    """

    is_mixin: ClassVar[bool] = True
    """Whether a class only brings a term, and is no module of its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("is_mixin", False):
            return
        cls.is_mixin = False
        _refuse_wrong_order(cls)
        step = cls.training_step
        if step is not LightningModule.training_step and not hasattr(step, "_adds_terms"):
            cls.training_step = _adding_terms(step)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._regularizers: list[AbstractRegularizer] = []
        self._is_stepping = False

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
            remedy = "With manual optimization, compute a criterion of `lightning_netsim.losses` in your step and add it there."
            raise expected("automatic_optimization", "True under a regularizing mixin", "False", remedy)
        self._automatic_optimization = True

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Save hyperparameters as Lightning does; criteria as their class and arguments, which any loader can read."""
        caller = inspect.currentframe()
        kwargs.setdefault("frame", None if caller is None else caller.f_back)
        with warnings.catch_warnings():  # Criteria do not stay modules there.
            warnings.filterwarnings("ignore", "Attribute '\\w+' is an instance of `nn.Module`")
            super().save_hyperparameters(*args, **kwargs)
        for held in (vars(self)["_hparams"], vars(self)["_hparams_initial"]):
            held.update({name: value.config() for name, value in held.items() if isinstance(value, AbstractSimilarityLoss)})

    def _step_with_terms(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiler_ctx is not None:
            remedy = "Compile the network inside it instead: `self.network = torch.compile(self.network)`."
            raise expected("model", "an uncompiled module under a regularizing mixin", "one compiled as a whole", remedy)
        batch, batch_idx = _batch_of(args, kwargs)
        due = [regularizer for regularizer in self._regularizers if regularizer.is_due(self.global_step)]
        with ExitStack() as stack:
            terms = [(each, stack.enter_context(each.watch(self, batch, batch_idx))) for each in due]
            result = step(self, *args, **kwargs)
        if result is None:  # The step is skipped.
            return None
        loss = result["loss"] if isinstance(result, Mapping) else result
        for regularizer, compute in terms:
            term, weight = compute(), regularizer.weight(self.global_step)
            loss = loss + weight * term.to(loss)
            self.log(f"netsim/{regularizer.name}_loss", term.detach())
            if not regularizer.weight.is_constant:
                self.log(f"netsim/{regularizer.name}_weight", weight)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss


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


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the batch and its number from the arguments of a training step."""
    batch = args[0] if args else kwargs.get("batch", kwargs.get("dataloader_iter"))
    batch_idx = args[1] if len(args) > 1 else kwargs.get("batch_idx", 0)
    return batch, int(batch_idx)
