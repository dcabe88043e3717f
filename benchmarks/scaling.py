"""Measure how time and memory grow with the number of images N, of parameters P, of directions d and of positions T.

- N: soft counts, and neighbors by the sketch, of MNIST training images, the network of 317,069 parameters, trained, d = 1;
- P: soft counts with the same network and wider hidden layers;
- d: soft counts with 1, 3 and all ten outputs' directions;
- T: soft counts with two convolutions and a mean over all pixels, on larger and larger random images.

Time is taken in one process, interleaved; memory is what a fresh process needs above the model and its images.

    python benchmarks/scaling.py [--quick] [--data-dir DIRECTORY] [--threads 2] [--out DIRECTORY]

Writes a figure, `growth.png`, and prints as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, counting
from benchmarks.common import Bound, Size
from benchmarks.neighbors import neighbors
from benchmarks.problems import Problem, mnist, random_images
from lightning_netsim.report import style

SIZES = {
    "images": Size(10_000, 128, "N at its greatest for time; for the memory of counts it is twice that"),
    "few_images": Size(256, 32, "images where something else than N grows"),
    "rounds": Size(2, 1, "timings of each"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {"growth_counts": Bound(4.2), "growth_neighbors": Bound(5.0), "growth_memory": Bound(1.1)}
# Widths of the hidden layer, directions, sides of the images: what P, d and T follow from.
VALUES = {"P": (64, 512, 4096), "d": (1, 3, 10), "T": (14, 28, 56)}
AXES = {"N": "images N", "P": "parameters P", "d": "directions d", "T": "positions T"}
JOBS = ("counts", "neighbors")


def problem_of(axis: str, value: int, options: argparse.Namespace) -> Problem:
    """Return the problem at one value of an axis: N itself, a width, a number of directions, or a side."""
    if axis == "N":
        # Twice the greatest N needs training images; all N take them, so that they differ in nothing else.
        return mnist(options.data_dir, max(value, 10_001), options.steps).first(value)
    problem = mnist(options.data_dir, options.few_images, steps=0)
    if axis == "P":
        layers = list(problem.network.children())
        layers[-3:] = [nn.Linear(1024, value), nn.PReLU(), nn.Linear(value, 10)]
        return replace(problem, network=nn.Sequential(*layers).eval())
    if axis == "T":
        return replace(problem, network=convolutions(), images=random_images(options.few_images, (1, value, value)))
    return problem


def convolutions() -> nn.Module:
    """Return a network that takes images of any size: 13,530 parameters, two convolutions at every pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (nn.Conv2d(1, 16, 5, padding=2, bias=False), nn.Conv2d(16, 32, 5, padding=2, bias=False))
        last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *last).eval()


def quantity(axis: str, value: int, problem: Problem) -> int:
    """Return what stands on the axis of the figure: N, P, d or T."""
    return {"N": len(problem), "P": problem.num_parameters, "d": value, "T": value * value}[axis]


def job_of(job: str, axis: str, value: int, problem: Problem) -> Callable[[], Any]:
    """Return what is timed or weighed."""
    if job == "plain":
        return partial(counting.plain, problem)
    if job == "neighbors":
        return partial(neighbors, problem, plan="sketch", loader=problem.loader())
    return partial(counting.ours, problem, value if axis == "d" else 1)


def sizes_of_n(options: argparse.Namespace) -> tuple[int, ...]:
    return tuple(options.images // part for part in (4, 2, 1))


def time_axis(axis: str, options: argparse.Namespace) -> tuple[common.Seconds, list[dict[str, Any]]]:
    """Time all values of an axis in turns; return the seconds and one record for each value."""
    values = sizes_of_n(options) if axis == "N" else VALUES[axis]
    jobs = ("plain", *JOBS) if axis == "N" else ("plain", "counts")
    greatest = problem_of(axis, values[-1], options)
    problems = {value: greatest.first(value) if axis == "N" else problem_of(axis, value, options) for value in values}
    functions = {f"{job}_{value}": job_of(job, axis, value, problems[value]) for value in values for job in jobs}
    for job in jobs:
        functions[f"{job}_{values[0]}"]()  # Warm up on the least; the greatest take long.
    seconds, _ = common.time_interleaved(functions, options.rounds, warm_up=False)
    medians = common.medians(seconds)
    return seconds, [
        {"value": value, axis: quantity(axis, value, problems[value])}
        | {f"{job}_seconds": medians[f"{job}_{value}"] for job in jobs}
        for value in values
    ]


def peaks(jobs: Sequence[tuple[str, str, int]], options: argparse.Namespace) -> list[float]:
    """Return the peak growth of memory in MB of each job at a value of an axis, in a fresh process each."""
    # Memory that training has left to the allocator would be used again: the weights stay initial.
    same = ["--data-dir", options.data_dir, "--few-images", str(options.few_images), "--steps", "0"]
    runs = [["--measure-memory", job, axis, str(value), "--threads", str(options.threads), *same] for job, axis, value in jobs]
    return common.peaks_megabytes(__file__, runs)


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Run one job in this process and return the growth of its memory."""
    job, axis, value = options.measure_memory[0], options.measure_memory[1], int(options.measure_memory[2])
    return common.growth_megabytes(job_of(job, axis, value, problem_of(axis, value, options)))


def weigh(series: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> float:
    """Add the peaks of memory to the records, one with twice the greatest N; return the growth of counts from N to 2N."""
    series["N"].append({"value": 2 * options.images, "N": 2 * options.images})
    least, half, *_, once, twice = series["N"]
    weighed = [("counts", axis, record) for axis, records in series.items() for record in records]
    weighed += [("neighbors", "N", least), ("neighbors", "N", half)]  # With more, a run takes minutes.
    found = peaks([(job, axis, record["value"]) for job, axis, record in weighed], options)
    for (job, _, record), megabytes in zip(weighed, found, strict=True):
        record[f"{job}_megabytes"] = megabytes
    return round(twice["counts_megabytes"] / once["counts_megabytes"], 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time and weigh; return the figures."""
    print(f"{options.threads} threads.", flush=True)
    timed = {axis: time_axis(axis, options) for axis in AXES}
    series = {axis: records for axis, (_, records) in timed.items()}
    least, *_, most = sizes_of_n(options)
    seconds = timed["N"][0]
    return {
        "growth_counts": common.ratio(seconds, f"counts_{most}", f"counts_{least}"),
        "growth_neighbors": common.ratio(seconds, f"neighbors_{most}", f"neighbors_{least}"),
        "growth_plain": common.ratio(seconds, f"plain_{most}", f"plain_{least}"),
        # A process takes seconds to start.
        "growth_memory": None if options.quick else weigh(series, options),
        "num_images": {"least": least, "most": most, "few": options.few_images},
        "series": series,
        "rounds": options.rounds,
    }


def plot(series: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw seconds and megabytes against N, P, d and T, all on logarithmic axes."""
    with style.styled():
        title = "How time and memory grow"
        reading = (
            "Soft counts in two sweeps, neighbors, and one plain forward and backward pass, against the number of images, of "
            "parameters, of directions and of positions per layer. Both axes are logarithmic: the thin line is proportional."
        )
        figure = style.new_figure(12.4, 6.4, title, reading)
        for column, (axis, label) in enumerate(AXES.items()):
            for row, unit in enumerate(("seconds", "megabytes")):
                panel = _panel(figure, row, column)
                _draw(panel, series[axis], axis, unit)
                if column == 0:
                    panel.set_ylabel({"seconds": "seconds", "megabytes": "peak memory, MB"}[unit])
                if row == 1:
                    panel.set_xlabel(label)
                if (row, column) == (0, 0):
                    panel.legend(loc="lower right", fontsize=8)
    return figure


def _panel(figure: Figure, row: int, column: int) -> Axes:
    """Return the axes of one panel; its inches from the figure's left and top edges follow from row and column."""
    width, height = figure.get_size_inches()
    pitch, tall = (width - 0.85 - 0.2) / len(AXES), 1.95
    left, top = 0.85 + column * pitch, 1.25 + row * (tall + 0.4)
    return style.add_axes(figure, left, height - top - tall, width - left - pitch + 0.45, top)


def _draw(panel: Axes, records: list[dict[str, Any]], axis: str, unit: str) -> None:
    colors = {"counts": style.GRADIENT, "neighbors": style.CYCLE[1], "plain": style.MUTED}
    for job, color in colors.items():
        points = [(record[axis], record[f"{job}_{unit}"]) for record in records if f"{job}_{unit}" in record]
        if points:
            panel.loglog(*zip(*points, strict=True), "o-", color=color, markersize=3.5, linewidth=1.3, label=job)
        if points and job == "counts":
            (start, value), end = points[0], points[-1][0]
            panel.loglog([start, end], [value, value * end / start], color=style.RULE, linewidth=1.0, zorder=0)
    shown = [record[axis] for record in records]
    panel.set_xticks(shown, [_short(value) for value in shown])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: _short(value))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(0.1)


def _short(value: float) -> str:
    """Write a number in a few letters: 2500 as 2.5k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def print_figures(figures: dict[str, Any]) -> None:
    columns = [f"{job}_{unit}" for unit in ("seconds", "megabytes") for job in ("plain", *JOBS)]
    for axis, records in figures["series"].items():
        shown = [column for column in columns if any(column in record for record in records)]
        rows = [(f"{record[axis]:,}", *(record.get(column) for column in shown)) for record in records]
        common.print_table((AXES[axis], *(column.replace("_", ", ") for column in shown)), rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the figures of its last line."""
    parser = common.make_parser(__doc__, SIZES)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="directory of the figure")
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    options = common.read_arguments(parser, SIZES, arguments)
    if options.measure_memory:
        megabytes = measure_memory(options)
        print(json.dumps(megabytes))
        return megabytes
    figures = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    style.save_figure(plot(figures["series"]), options.out / "growth.png", dpi=100)
    print_figures(figures)
    print(f"The figure is {options.out / 'growth.png'}.")
    return common.finish(figures, BOUNDS, options)


if __name__ == "__main__":
    main()
