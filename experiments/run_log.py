"""Keep what each run of an experiment has found, so that an interrupted one goes on; and sum it up."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


class RunLog:
    """The log of runs, a CSV file: a run that stands in it is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, float]] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    found = {name: float(value) for name, value in row.items() if name.startswith("=")}
                    key = tuple(value for name, value in row.items() if not name.startswith("="))
                    self.rows[key] = {name[1:]: value for name, value in found.items()}

    def get(self, key: dict[str, Any], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return what the run of this key has found, or make it and write it down; columns of what is found begin with "="."""
        place = tuple(map(str, key.values()))
        if place not in self.rows:
            found = {name: float(f"{value:.6g}") for name, value in make().items()}
            row = key | {f"={name}": value for name, value in found.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.is_file()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row))
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            self.rows[place] = found
        return self.rows[place]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values and its standard error; 0 for a single one."""
    series = pd.Series(values)
    return float(series.mean()), float(series.sem()) if len(series) > 1 else 0.0
