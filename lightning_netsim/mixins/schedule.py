"""Numbers that change in the course of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from lightning_netsim._checks import expected

#: What a weight is given as: a number, points (step, weight) with straight lines between them, or a function of the step.
ScheduleLike = float | list[tuple[int, float]] | Callable[[int], float]


class Schedule:
    """The weight of a criterion as a function of the optimizer step.

    Args:
        weight: a number; a list of points [step, weight], in order of their steps, joined by straight lines, constant before
            the first and after the last; or a function step -> weight.

        name: what messages call it.

    Raises:
        ValueError: for anything else.

    Example:
        >>> warm_up = Schedule([(0, 0.0), (100, 0.5)])
        >>> warm_up(0), warm_up(50), warm_up(1000)
        (0.0, 0.25, 0.5)
    """

    def __init__(self, weight: ScheduleLike, name: str = "weight") -> None:
        self._function: Callable[[int], float] | None = None
        self._points: list[tuple[float, float]] = []
        if callable(weight):
            self._function = weight
        elif isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight):
            self._points = [(0.0, float(weight))]
        else:
            self._points = _points(weight, name)

    @property
    def is_constant(self) -> bool:
        """Whether the weight is the same at every step."""
        return self._function is None and len(self._points) == 1

    def __call__(self, step: int) -> float:
        """Return the weight at an optimizer step."""
        if self._function is not None:
            return float(self._function(step))
        for (start, low), (stop, high) in itertools.pairwise(self._points):
            if start <= step < stop:
                return low + (high - low) * (step - start) / (stop - start)
        return self._points[-1][1] if step >= self._points[-1][0] else self._points[0][1]


def _points(weight: object, name: str) -> list[tuple[float, float]]:
    wanted = "a number, a list of points [step, weight] in order of their steps, or a function of the step"
    if not isinstance(weight, Sequence) or not weight or isinstance(weight, str):
        raise expected(name, wanted, repr(weight))
    pairs = [tuple(point) if isinstance(point, (list, tuple)) else () for point in weight]
    numbers = all(len(pair) == 2 and all(isinstance(value, (int, float)) for value in pair) for pair in pairs)
    if not numbers or any(first[0] >= second[0] for first, second in itertools.pairwise(pairs)):
        raise expected(name, wanted, repr(weight))
    return [(float(step), float(value)) for step, value in pairs]
