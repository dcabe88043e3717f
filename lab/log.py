"""Keep what each run has found, so that an interrupted study goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """The log of runs, a CSV file: a run that stands in it is not repeated.

    Its columns are the key of a run and, after "=", what it has found: numbers, or whatever JSON can hold.

    Args:
        path: the file; it and its directory are made with the first run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    key = tuple(value for name, value in row.items() if not name.startswith("="))
                    self.rows[key] = {name[1:]: _read(value) for name, value in row.items() if name.startswith("=")}

    def get(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the run of this key has found, or make it and write it down, numbers with six digits."""
        place = tuple(map(str, key.values()))
        if place not in self.rows:
            found = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in make().items()}
            row = {**key, **{f"={name}": json.dumps(value) for name, value in found.items()}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.is_file()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row))
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            self.rows[place] = found
        return self.rows[place]

    def by_seed(
        self, key: Mapping[str, Any], seeds: Iterable[int], make: Callable[[int], Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return what the runs of this key have found, one for each seed; `make` is called with the seed."""
        return [self.get({**key, "seed": seed}, lambda seed=seed: make(seed)) for seed in seeds]  # type: ignore[misc]


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # nan and inf, as earlier logs have them
        return float(value)
