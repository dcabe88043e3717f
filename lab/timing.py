"""Time functions in turns, and compare them within the same round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Seconds = dict[str, list[float]]
"""For each method, its seconds in each round."""


def time_interleaved(
    functions: Mapping[str, Callable[..., Any]],
    rounds: int,
    warm_up: bool = True,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> tuple[Seconds, dict[str, Any]]:
    """Time functions in turns, in an order that turns from round to round: what else the machine does falls on all of them.

    Args:
        functions: what is timed, by name.
        rounds: timings of each.
        warm_up: run each once before the first round; False where that has been done.
        prepare: what makes the argument of a function, each time anew and not timed.

    Returns:
        the seconds, and what each function returned the last time.
    """
    seconds: Seconds = {name: [] for name in functions}
    answers: dict[str, Any] = {}
    names, prepare = list(functions), prepare or {}
    for turn in range(-1 if warm_up else 0, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            arguments = (prepare[name](),) if name in prepare else ()
            start = time.perf_counter()
            answers[name] = functions[name](*arguments)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds, answers


def ratios(seconds: Seconds, over: str, under: str) -> list[float]:
    """Return the ratio of two methods within the same round, for each round, ascending."""
    return sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def ratio(seconds: Seconds, over: str, under: str) -> float:
    """Return the median over the rounds of the ratio of two methods within the same round."""
    return round(median(ratios(seconds, over, under)), 2)


def medians(seconds: Seconds) -> dict[str, float]:
    """Return the median seconds of each method."""
    return {name: round(median(values), 4) for name, values in seconds.items()}
