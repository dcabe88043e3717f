"""What makes a function a script: its arguments from one declaration, its log, tables and figures, and its closing line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.log import RunLog
from lab.memory import growth_megabytes, peaks_megabytes
from lab.tables import format_table, write_section
from lightning_netsim.report import style

PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Size:
    """An argument that `--quick` makes small.

    Attributes:
        full: its value in a full run: a number, a text, a sequence of such, or False for a switch.
        quick: its value under `--quick`; None for the same.
        meaning: what it is, for `--help`.
        kind: what reads it from the command line; by default the type of `full`, or of its first element.
        choices: what it may be; all that it may be where there are none.
    """

    full: Any
    quick: Any
    meaning: str
    kind: Callable[[str], Any] | None = None
    choices: Sequence[Any] | None = None

    def add_to(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the argument to a parser; one that is not given is None."""
        options: dict[str, Any] = {"default": None, "help": self.meaning}
        if isinstance(self.full, bool):
            options["action"] = "store_true"
        else:
            several = isinstance(self.full, Sequence) and not isinstance(self.full, str)
            options |= {"type": self.kind or type(self.full[0] if several else self.full), "choices": self.choices}
            options |= {"nargs": "+"} if several else {}
            shown = " ".join(map(str, self.full)) if several else self.full
            options["help"] += "" if self.full is None else f" ({shown})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


@dataclass(frozen=True)
class Bound:
    """What a figure is held to.

    Attributes:
        limit: the least or greatest value allowed.
        aim: what would be better.
        at_least: whether greater is better.
        what: what the figure is, in words.
    """

    limit: float
    aim: float | None = None
    at_least: bool = False
    what: str = ""

    def holds(self, figure: float) -> bool:
        """Return whether a figure is within the bound."""
        return figure >= self.limit if self.at_least else figure <= self.limit


class Study:
    """A script that runs.

    Attributes:
        script: what was declared.
        options: its arguments.
        is_full: whether all sizes are those of a full run.
    """

    def __init__(self, script: Script, options: argparse.Namespace) -> None:
        self.script, self.options = script, options
        self.is_full = all(self.sizes[name] == _plain(size.full) for name, size in script.sizes.items()) and not options.quick
        self._start = time.perf_counter()

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes, for the closing line."""
        return {name: _plain(getattr(self.options, name)) for name in self.script.sizes}

    @property
    def seconds(self) -> float:
        """What it has taken until now."""
        return round(time.perf_counter() - self._start, 1)

    @cached_property
    def log(self) -> RunLog:
        """The log of its runs, `OUT/runs.csv`."""
        return RunLog(self.options.out / "runs.csv")

    def table(
        self,
        name: str,
        head: Sequence[str],
        rows: Sequence[Sequence[object]],
        formats: Sequence[str] = (),
        title: str = "",
        left: int = 1,
    ) -> None:
        """Print a table, see `format_table`; a full run and `--write` also write it to its place in the page of the study."""
        text = format_table(head, rows, formats, left)
        print(f"\n{title}\n\n{text}" if title else f"\n{text}", flush=True)
        if self.is_full or self.options.write:
            page = PAGES / f"{self.script.page or self.script.name}.md"
            if not write_section(page, name, text):
                print(f"{page} has no place for it: no line <!-- table: {name} -->.")

    def figure(self, figure: Figure, name: str | None = None, dpi: int = 100) -> None:
        """Write a figure to `OUT/NAME.png`; by default it is called like the script."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        print(f"\nWritten: {style.save_figure(figure, self.options.out / f'{name or self.script.name}.png', dpi)}")

    def peaks(self, runs: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[float]:
        """Return the peak growth of memory in MB of each of `weigh`'s jobs, in a fresh process each; sizes are single numbers.

        Args:
            runs: for each one the arguments of `weigh`, and the sizes that differ from those of this script.
        """
        commands = []
        for what, changes in runs:
            given = {"threads": self.options.threads, "data_dir": self.options.data_dir} | self.sizes | dict(changes)
            sizes = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
            commands.append(["--measure-memory", *what, *sizes])
        return peaks_megabytes(self.script.file, commands)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (range, tuple)) else value


@dataclass(frozen=True)
class Script:
    """A function with the arguments of a script; see `script`."""

    function: Callable[[Study], dict[str, Any]]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    threads: int = 1
    weigh: Callable[..., Callable[[], object]] | None = None
    page: str | None = None

    @property
    def file(self) -> Path:
        """The file that the function stands in."""
        return Path(self.function.__globals__["__file__"]).resolve()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.file.stem

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Return the arguments, sizes that were not given filled in."""
        parser = argparse.ArgumentParser(description=(self.function.__globals__["__doc__"] or "").split("\n")[0])
        parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, nothing else")
        parser.add_argument("--data-dir", default="../shared/data", help="where MNIST/raw and other data lie")
        parser.add_argument("--threads", type=int, default=self.threads, help=f"threads of torch ({self.threads})")
        parser.add_argument("--out", type=Path, default=Path("runs") / self.name, help="directory of what is written")
        parser.add_argument("--write", action="store_true", help="write tables to docs/results/ with other sizes, too")
        parser.add_argument("--measure-memory", nargs="+", help=argparse.SUPPRESS)
        for name, size in self.sizes.items():
            size.add_to(parser, name)
        options = parser.parse_args(arguments)
        for name, size in self.sizes.items():
            if getattr(options, name) is None:
                setattr(options, name, size.quick if options.quick and size.quick is not None else size.full)
        return options

    def __call__(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Run the script and return the figures of its last line, which a full run also writes to `OUT/figures.json`.

        A quick run holds no bounds: its figures are not those of the claims.
        """
        options = self.read(arguments)
        torch.set_num_threads(options.threads)
        if options.measure_memory:
            figures: dict[str, Any] = {"megabytes": growth_megabytes(self.weigh(options, *options.measure_memory))}
        else:
            study = Study(self, options)
            figures = self.function(study)
            figures |= {"threads": options.threads, "quick": options.quick, "torch": torch.__version__}
            if self.bounds and not options.quick:
                known = {name: bound for name, bound in self.bounds.items() if figures.get(name) is not None}
                figures["held"] = {name: bound.holds(figures[name]) for name, bound in known.items()}
            if study.is_full:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "figures.json").write_text(json.dumps(figures | {"seconds": study.seconds}, indent=1), "utf-8")
        print(json.dumps(figures))
        return figures


def script(
    sizes: Mapping[str, Size] | None = None,
    bounds: Mapping[str, Bound] | None = None,
    threads: int = 1,
    weigh: Callable[..., Callable[[], object]] | None = None,
    page: str | None = None,
) -> Callable[[Callable[[Study], dict[str, Any]]], Script]:
    """Make a function of a study, which returns its figures, a script: the file's docstring is its help.

    Args:
        sizes: its arguments, beside those that all scripts take.
        bounds: what its figures are held to, by name.
        threads: of torch.
        weigh: for `Study.peaks`: takes the options and words that say what, prepares, and returns the job whose memory counts.
        page: of `docs/results/`, where its tables stand; by default it is called like the file.
    """
    return lambda function: Script(function, sizes or {}, bounds or {}, threads, weigh, page)
