"""What all benchmarks share: arguments, interleaved timing, memory of a fresh process, tables, the closing line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

# What the allocator keeps of freed memory is not what a method needs, and differs from process to process by a half: with these
# settings, which glibc reads, it returns larger tensors to the system at once, and peaks agree to 1 %.
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Seconds = dict[str, list[float]]
"""For each method, its seconds in each round."""


@dataclass(frozen=True)
class Size:
    """A number that `--quick` makes small.

    Attributes:
        full: its value in a full run.
        quick: its value under `--quick`.
        meaning: what it is.
    """

    full: int
    quick: int
    meaning: str


@dataclass(frozen=True)
class Bound:
    """What a figure is held to.

    Attributes:
        limit: the least or greatest value allowed.
        aim: what would be better.
        at_least: whether greater is better.
    """

    limit: float
    aim: float | None = None
    at_least: bool = False

    def holds(self, figure: float) -> bool:
        """Return whether a figure is within the bound."""
        return figure >= self.limit if self.at_least else figure <= self.limit


def make_parser(description: str | None, sizes: Mapping[str, Size]) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all benchmarks take, and of one for each size."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    small = ", ".join(f"{size.quick} {name.replace('_', ' ')}" for name, size in sizes.items())
    parser.add_argument("--quick", action="store_true", help=f"{small}: shows that it works, not what it costs")
    parser.add_argument("--data-dir", default="../shared/data", help="where MNIST/raw, cifar10 and weights lie")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{size.meaning} ({size.full})")
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, sizes: Mapping[str, Size], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return the arguments, sizes that were not given filled in; set the number of threads."""
    options = parser.parse_args(arguments)
    for name, size in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, size.quick if options.quick else size.full)
    torch.set_num_threads(options.threads)
    return options


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


class PeakMemory:
    """Look at the resident memory of this process every millisecond, from another thread.

    The operating system's own record of the peak is no use here: it includes what was held before.

    Attributes:
        growth: bytes by which it grew at most since the beginning.
    """

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self._peak - self._before

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)


def peak_megabytes(script: str, arguments: Sequence[str]) -> float:
    """Return by how much the resident memory of a fresh process grows at most while it measures, in MB.

    Args:
        script: the file of a benchmark whose last line is `{"megabytes": ...}` when it is called with these arguments.
        arguments: of the script.
    """
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | RETURN_AT_ONCE).stdout
    return float(json.loads(answer.splitlines()[-1])["megabytes"])


def peaks_megabytes(script: str, runs: Sequence[Sequence[str]]) -> list[float]:
    """Return what `peak_megabytes` returns for each list of arguments; two at a time, for what else runs does not matter."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda arguments: peak_megabytes(script, arguments), runs))


def growth_megabytes(function: Callable[[], object]) -> dict[str, float]:
    """Run a function and return by how much the resident memory of this process grew at most: what `peak_megabytes` reads."""
    with PeakMemory() as memory:
        function()
    return {"megabytes": round(memory.growth / 1e6, 1)}


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, the first column left and the others right, "-" for None."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(head), *texts]) for column in range(len(head))]
    print()
    for line in [list(head), ["-" * (widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])], *texts]:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |")
    print()


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def finish(figures: dict[str, Any], bounds: Mapping[str, Bound], options: argparse.Namespace) -> dict[str, Any]:
    """Print the figures as one line of JSON, with how they were measured and which bounds hold; return them.

    A quick run holds nothing: its figures are not those of the claims.
    """
    figures |= {"threads": options.threads, "quick": options.quick, "torch": torch.__version__}
    if not options.quick:
        figures["held"] = {name: bound.holds(figures[name]) for name, bound in bounds.items() if figures.get(name) is not None}
    print(json.dumps(figures))
    return figures
