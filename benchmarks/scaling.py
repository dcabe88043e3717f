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
import sys
from collections.abc import Callable
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

from benchmarks import counting
from benchmarks.neighbors import neighbors
from benchmarks.problems import Problem, mnist, random_images
from lab import Bound, Size, Study, medians, ratio, script, time_interleaved
from lab.figures import panels
from lightning_netsim.report import style

SIZES = {
    "images": Size(10_000, 128, "N at its greatest for time; for the memory of counts it is twice that"),
    "few_images": Size(256, 32, "images where something else than N grows"),
    "rounds": Size(2, 1, "timings of each"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "growth_counts": Bound(4.2, what="time of soft counts, four times the images"),
    "growth_neighbors": Bound(5.0, what="time of counts and neighbors, four times the images"),
    "growth_memory": Bound(1.1, what="peak memory of soft counts above the model and its data, N doubled"),
}
# Widths of the hidden layer, directions, sides of the images: what P, d and T follow from.
VALUES = {"P": (64, 512, 4096), "d": (1, 3, 10), "T": (14, 28, 56)}
AXES = {"N": "images N", "P": "parameters P", "d": "directions d", "T": "positions T"}
COLORS = {"counts": style.GRADIENT, "neighbors": style.CYCLE[1], "plain": style.MUTED}

Series = dict[str, list[dict[str, Any]]]
"""For each axis, what was measured at each value."""


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


def job_of(job: str, axis: str, value: int, problem: Problem) -> Callable[[], Any]:
    """Return what is timed or weighed."""
    if job == "plain":
        return partial(counting.plain, problem)
    if job == "neighbors":
        return partial(neighbors, problem, plan="sketch", loader=problem.loader())
    return partial(counting.ours, problem, value if axis == "d" else 1)


def weigh(options: argparse.Namespace, job: str, axis: str, value: str) -> Callable[[], Any]:
    """Return one job at a value of an axis."""
    return job_of(job, axis, int(value), problem_of(axis, int(value), options))


def time_axis(axis: str, options: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Time all values of an axis in turns; return the seconds and one record for each value."""
    values = tuple(options.images // part for part in (4, 2, 1)) if axis == "N" else VALUES[axis]
    jobs = ("plain", "counts", "neighbors") if axis == "N" else ("plain", "counts")
    greatest = problem_of(axis, values[-1], options)
    problems = {value: greatest.first(value) if axis == "N" else problem_of(axis, value, options) for value in values}
    functions = {f"{job}_{value}": job_of(job, axis, value, problems[value]) for value in values for job in jobs}
    for job in jobs:
        functions[f"{job}_{values[0]}"]()  # Warm up on the least; the greatest take long.
    seconds, _ = time_interleaved(functions, options.rounds, warm_up=False)
    typical, records = medians(seconds), []
    for value, problem in problems.items():
        quantity = {"N": len(problem), "P": problem.num_parameters, "d": value, "T": value * value}[axis]
        records.append({"value": value, axis: quantity} | {f"{job}_seconds": typical[f"{job}_{value}"] for job in jobs})
    return seconds, records


def weigh_all(series: Series, study: Study) -> float:
    """Add the peaks of memory to the records, one with twice the greatest N; return the growth of counts from N to 2N."""
    twice = 2 * study.options.images
    series["N"].append({"value": twice, "N": twice})
    weighed = [("counts", axis, record) for axis, records in series.items() for record in records]
    weighed += [("neighbors", "N", record) for record in series["N"][:2]]  # With more, a run takes minutes.
    # Memory that training has left to the allocator would be used again: the weights stay initial.
    found = study.peaks([((job, axis, str(record["value"])), {"steps": 0}) for job, axis, record in weighed])
    for (job, _, record), megabytes in zip(weighed, found, strict=True):
        record[f"{job}_megabytes"] = megabytes
    return round(series["N"][-1]["counts_megabytes"] / series["N"][-2]["counts_megabytes"], 3)


def plot(series: Series) -> Figure:
    """Draw seconds and megabytes against N, P, d and T, all on logarithmic axes."""
    reading = (
        "Soft counts in two sweeps, neighbors, and one plain forward and backward pass, against the number of images, of "
        "parameters, of directions and of positions per layer. Both axes are logarithmic: the thin line is proportional."
    )
    with panels("How time and memory grow", reading, 2, len(AXES), (2.4, 1.95), (0.45, 0.4), (0.85, 0.2)) as (figure, rows):
        for unit, label, row in zip(("seconds", "megabytes"), ("seconds", "peak memory, MB"), rows, strict=True):
            row[0].set_ylabel(label)
            for axes, axis in zip(row, AXES, strict=True):
                draw(axes, series[axis], axis, unit)
        for axes, label in zip(rows[1], AXES.values(), strict=True):
            axes.set_xlabel(label)
        rows[0][0].legend(loc="lower right", fontsize=8)
    return figure


def draw(axes: Axes, records: list[dict[str, Any]], axis: str, unit: str) -> None:
    for job, color in COLORS.items():
        points = [(record[axis], record[f"{job}_{unit}"]) for record in records if f"{job}_{unit}" in record]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", color=color, markersize=3.5, linewidth=1.3, label=job)
        if points and job == "counts":
            (start, value), end = points[0], points[-1][0]
            axes.loglog([start, end], [value, value * end / start], color=style.RULE, linewidth=1.0, zorder=0)
    shown = [record[axis] for record in records]
    axes.set_xticks(shown, [shorten(value) for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: shorten(value))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)


def shorten(value: float) -> str:
    """Write a number in a few letters: 2500 as 2.5k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@script(SIZES, BOUNDS, threads=2, weigh=weigh, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Time and weigh."""
    timed = {axis: time_axis(axis, study.options) for axis in AXES}
    series = {axis: records for axis, (_, records) in timed.items()}
    seconds, least, most = timed["N"][0], study.options.images // 4, study.options.images
    figures = {f"growth_{job}": ratio(seconds, f"{job}_{most}", f"{job}_{least}") for job in COLORS}
    # A process takes seconds to start.
    figures |= {"growth_memory": None if study.options.quick else weigh_all(series, study)}
    for axis, records in series.items():
        columns = [key for key in dict.fromkeys(key for record in records for key in record) if key not in ("value", axis)]
        rows = [(f"{record[axis]:,}", *(record.get(column) for column in columns)) for record in records]
        study.table(f"growth_{axis}", (axis, *(column.replace("_", ", ") for column in columns)), rows)
    study.figure(plot(series), "growth")
    return figures | {"series": series, "options": study.sizes}


if __name__ == "__main__":
    main()
