"""What is measured, and within which bounds: every setting with its default and its text, once."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from lightning_netsim._checks import check_choice, check_numbers, check_positive_int, check_positive_number
from lightning_netsim.estimators.index import NeighborIndex
from lightning_netsim.jacobian.directions import Directions, DirectionsLike

PLANS = ("auto", "store", "sketch", "reiterate")
PRECISIONS = ("float32", "inherit")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class SweepSettings:
    """What is measured and within which bounds; the ways in take these as keyword arguments, see `takes_settings`.

    Args:
        k: the number of neighbors of each sample.
        directions: which functions of the outputs are differentiated: "auto" (all of up to four outputs, else four random
            directions, whose soft counts correlate at 0.99 with those of all), "all" (the paper's kernel, a
            backward pass for each), a number of random directions, a (D, d) matrix or a function; see `Directions`.
        parameters: "trainable", or names of parameters or modules to differentiate with respect to.
        thresholds: τ of hard counts #{j : k ≥ τ}, in [-1, 1]: exact where all pairs are compared, else estimated with a
            measured error.
        powers: α of power counts Σ_j max(k, 0)^α, above 0; likewise.
        max_samples: measure a fixed random subset of this many samples of each set.
        memory_budget: bytes that features may take; None for a quarter of the free memory of the device.
        projection_dim: the width of the sketches that candidates are found by, before these are compared exactly.
        index_factory: a faiss `index_factory` string for the search of candidates.
        plan: "store" compares all pairs, "sketch" only candidates, both with exact features in memory; "reiterate" sweeps
            again where those do not fit; "auto" takes the one with the shortest expected time within the budget.
        precision: "float32", or "inherit" to differentiate in the precision of the surrounding autocast.
        compare_activations: find the neighbors under activations too.
        activation_layer: the module whose output they are; None for the input of the last linear layer.
        render: turns one sample of the inputs into a picture (array) or a text.
        class_names: names of the classes 0, 1, 2, ...; None takes those of the data module or data set in a Trainer.
        seed: seed of random directions, sketch and subset.
        chunk_size: samples that are differentiated at a time; None for what the budget allows.

    Raises:
        ValueError: for a value out of range, or an index that faiss cannot build.
    """

    k: int = 10
    directions: DirectionsLike = "auto"
    parameters: str | Iterable[str] = "trainable"
    thresholds: Iterable[float] = ()
    powers: Iterable[float] = ()
    max_samples: int | None = None
    memory_budget: float | None = None
    projection_dim: int = 2048
    index_factory: str = "Flat"
    plan: str = "auto"
    precision: str = "float32"
    compare_activations: bool = True
    activation_layer: str | None = None
    render: Callable[[Any], Any] | None = None
    class_names: Iterable[str] | None = None
    seed: int = 0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_positive_int("k", self.k)
        check_positive_int("projection_dim", self.projection_dim)
        check_choice("plan", self.plan, PLANS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("chunk_size", "max_samples"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.memory_budget is not None:
            check_positive_number("memory_budget", self.memory_budget, "It is a number of bytes.")
        Directions(self.directions, self.seed)
        object.__setattr__(self, "thresholds", check_numbers("thresholds", self.thresholds, -1.0, 1.0))
        object.__setattr__(self, "powers", check_numbers("powers", self.powers, 1e-6))
        if self.class_names is not None:
            object.__setattr__(self, "class_names", [str(name) for name in self.class_names])
        if self.index_factory != "Flat":
            NeighborIndex(max(16, self.projection_dim), self.index_factory)


# What only tests set.
_PRIVATE = ("chunk_size",)
# The text of each setting, its later lines indented by four.
_TEXTS = {
    name: text.replace("\n" + " " * 8, "\n")
    for name, text in re.findall(r"\n {8}(\w+): (.*?)(?=\n {8}\w|\n\n)", SweepSettings.__doc__ or "", re.DOTALL)
}


def takes_settings(*names: str) -> Callable[[F], F]:
    """Give a function with `**settings` the settings of these names as keyword arguments; without names, all of them.

    They stand in its signature with type and default, and in its docstring in the place of the line ``**settings: ...``. That
    is where `help`, notebooks and the command line read them. An argument that the function has itself, such as `k` in second
    place, keeps its place and gets its text from here, if it has none.
    """
    types = get_type_hints(SweepSettings)
    taken = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in fields(SweepSettings)
        if (field.name in names if names else field.name not in _PRIVATE)
    }

    def decorate(target: F) -> F:
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [parameter for name, parameter in taken.items() if name not in signature.parameters]
        signature = signature.replace(parameters=[*own, *added])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{target.__qualname__}() {error}") from None
            return function(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        text = target.__doc__ or ""
        missing = [name for name in taken if not re.search(rf"\n +{name}: ", text)]
        place = re.search(r"( *)\*\*settings: .*", text)
        if place:
            texts = "\n".join(f"{name}: {_TEXTS[name]}" for name in missing)
            target.__doc__ = text.replace(place[0], textwrap.indent(texts, place[1]))
        if isinstance(target, type):
            target.__init__ = checked  # type: ignore[misc]
            return target
        checked.__doc__ = target.__doc__
        return checked  # type: ignore[return-value]

    return decorate
