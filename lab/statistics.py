"""Means with their standard errors, differences seed by seed, rank correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd


class Mean(NamedTuple):
    """A mean and its standard error. `f"{mean:+.2f}"` is "+0.12 ± 0.03", `100 * mean` is in percent; in JSON it is a list."""

    mean: float
    error: float

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} ± {self.error:{form.lstrip('+')}}"

    def __mul__(self, factor: float) -> Mean:  # type: ignore[override]
        return Mean(self.mean * factor, self.error * factor)

    __rmul__ = __mul__  # type: ignore[assignment]

    def __round__(self, digits: int) -> Mean:
        return Mean(round(self.mean, digits), round(self.error, digits))


def mean_of(values: Sequence[Any], key: str | None = None) -> Mean:
    """Return the mean of values and its standard error, which is 0 for a single one.

    Args:
        values: numbers, or runs as the log has them.
        key: which figure of each run.
    """
    series = pd.Series(values if key is None else [run[key] for run in values])
    return Mean(float(series.mean()), float(series.sem()) if len(series) > 1 else 0.0)


def difference(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], key: str) -> Mean:
    """Return the mean difference of a figure between runs and other runs of the same seeds, and its standard error."""
    return mean_of([run[key] - other[key] for run, other in zip(runs, others, strict=True)])


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return the rank correlation; None where one side is constant."""
    first, second = pd.Series(left).rank(), pd.Series(right).rank()
    return None if min(first.std(), second.std()) == 0 else float(first.corr(second))
