"""Measure what exact soft neighbor counts cost, in units of one plain forward and backward pass over the same images.

MNIST images and the network of 317,069 parameters, briefly trained; CIFAR-10 images and a trained ResNet-20; one random
direction of the outputs (d = 1). Compared, in one process, interleaved and warmed up:

- `plain`: forward and backward, gradients of all weights summed over the batch: what a training step does before the optimizer;
- `ours`: exact soft counts in two sweeps and O(P) memory;
- `ours_stored`: exact soft counts in one sweep, all gradients kept;
- `vmap_two_pass`: the same two sweeps and memory by `torch.func.vmap(grad)`, the gradients of a chunk formed in each;
- `vmap_stored`: one sweep by `vmap(grad)` with the gradients of all images kept, N·P numbers.

    python benchmarks/soft_counts.py [--quick] [--data-dir DIRECTORY] [--threads 2]

That all ways give the same counts is checked before anything is timed. Memory is measured in a fresh process each. The last
line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, counting
from benchmarks.common import Bound, Seconds, Size
from benchmarks.problems import Problem, cifar, mnist

SIZES = {
    "images": Size(10_000, 256, "MNIST images counted in two sweeps"),
    "stored_images": Size(1024, 128, "MNIST images of the comparison with stored gradients, which must fit into memory"),
    "resnet_images": Size(1000, 64, "CIFAR-10 images"),
    "rounds": Size(5, 3, "timings of each method"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "ratio_plain": Bound(3.0, 2.3),
    "ratio_plain_resnet20": Bound(2.7, 2.1),
    "ratio_plain_stored": Bound(1.9, 1.4),
    "speedup_vmap_two_pass": Bound(3.0, at_least=True),
    "peak_growth": Bound(1.2),
}
PLAIN_CHUNKS = (64, 128, 256)

Ways = Mapping[str, Callable[[Problem], Tensor]]


def ways() -> Ways:
    """Return the ways of counting by name; one that keeps the gradients keeps its memory from call to call."""
    return {
        "ours": counting.ours,
        "ours_stored": counting.ours_stored,
        "vmap_two_pass": counting.vmap_two_pass,
        "vmap_stored": counting.VmapStored(),
    }


def largest_disagreement(problem: Problem, compared: Ways) -> float:
    """Return the largest disagreement between the first way of counting and the others.

    Raises:
        RuntimeError: if it is above the tolerance.
    """
    first, *others = (way(problem) for way in compared.values())
    largest = max(counting.disagreement(other, first) for other in others)
    if not largest <= counting.TOLERANCE:
        raise RuntimeError(f"The ways of counting disagree by {largest:.1e}, more than {counting.TOLERANCE:g}.")
    return largest


def time_ways(problem: Problem, compared: Ways, rounds: int, plain_chunks: Sequence[int] = ()) -> Seconds:
    """Time the plain pass, in chunks of several sizes, and ways of counting, which the check has warmed up."""
    counting.plain(problem.first(4 * problem.chunk_size))
    functions: dict[str, Callable[[], Any]] = {"plain": lambda: counting.plain(problem)}
    functions |= {f"plain_{size}": lambda size=size: counting.plain(problem, size) for size in plain_chunks}
    functions |= {name: lambda way=way: way(problem) for name, way in compared.items()}
    return common.time_interleaved(functions, rounds, warm_up=False)[0]


def peaks(methods: Sequence[tuple[str, int]], options: argparse.Namespace) -> list[float]:
    """Return the peak growth of memory in MB while a method counts so many images, each in a fresh process."""
    common_arguments = ["--threads", str(options.threads), "--data-dir", options.data_dir]
    runs = [["--measure-memory", method, "--images", str(images), *common_arguments] for method, images in methods]
    return common.peaks_megabytes(__file__, runs)


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Run one method in this process; weights make no difference to memory, and stay initial."""
    problem = mnist(options.data_dir, options.images, steps=0)
    way = {"plain": counting.plain, **ways()}[options.measure_memory]
    return common.growth_megabytes(lambda: way(problem))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check, time and weigh all methods; return the figures."""
    digits = mnist(options.data_dir, options.images, options.steps)
    few, photos = digits.first(options.stored_images), cifar(options.data_dir, options.resnet_images)
    every = ways()
    two_sweeps = {"ours": every["ours"]}
    print(f"{len(digits):,} and {len(few):,} {digits.what}; {len(photos):,} {photos.what}; {options.threads} threads.")
    checked = {name: every[name] for name in ("ours", "vmap_two_pass")}
    errors = {"mnist": largest_disagreement(few, every), "resnet20": largest_disagreement(photos.first(256), checked)}
    print(f"All ways of counting agree to {max(errors.values()):.1e}.")
    seconds = {
        "mnist": time_ways(digits, two_sweeps, options.rounds),
        "mnist_stored": time_ways(few, every, options.rounds, PLAIN_CHUNKS),
        "resnet20": time_ways(photos, two_sweeps, options.rounds),
    }
    others = (
        () if options.quick else ("plain", *(name for name in every if name != "ours"))
    )  # A process takes seconds to start.
    weighed = [("ours", len(few)), ("ours", 2 * len(few)), *((name, len(few)) for name in others)]
    megabytes = peaks(weighed, options)
    by_method = {"ours": megabytes[:2]} | {name: [value] for (name, _), value in zip(weighed[2:], megabytes[2:], strict=True)}
    return figures_of(seconds, by_method) | {
        "disagreement": errors,
        "images": {"mnist": digits.what, "resnet20": photos.what},
        "num_images": {"mnist": len(digits), "mnist_stored": len(few), "resnet20": len(photos)},
        "num_parameters": {"mnist": digits.num_parameters, "resnet20": photos.num_parameters},
        "chunk_size": digits.chunk_size,
        "rounds": options.rounds,
    }


def figures_of(seconds: dict[str, Seconds], peaks: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios of seconds and of bytes."""
    many, few, photos = seconds["mnist"], seconds["mnist_stored"], seconds["resnet20"]
    fastest = min((f"plain_{size}" for size in PLAIN_CHUNKS), key=lambda name: median(few[name]))
    spread = common.ratios(many, "ours", "plain")
    return {
        "ratio_plain": common.ratio(many, "ours", "plain"),
        "ratio_plain_range": [round(spread[0], 2), round(spread[-1], 2)],
        "ratio_plain_fastest_chunk": common.ratio(few, "ours", fastest),
        "fastest_plain_chunk": int(fastest.removeprefix("plain_")),
        "ratio_plain_resnet20": common.ratio(photos, "ours", "plain"),
        "ratio_plain_stored": common.ratio(few, "ours_stored", "plain"),
        "speedup_vmap_two_pass": common.ratio(few, "vmap_two_pass", "ours"),
        "speedup_vmap_stored": common.ratio(few, "vmap_stored", "ours"),
        "peak_growth": round(peaks["ours"][1] / peaks["ours"][0], 3),
        "peak_megabytes": peaks,
        "median_seconds": {name: common.medians(each) for name, each in seconds.items()},
    }


def print_figures(figures: dict[str, Any]) -> None:
    names = {"mnist": "MNIST", "mnist_stored": "MNIST, stored", "resnet20": "ResNet-20"}
    rows = []
    for group, seconds in figures["median_seconds"].items():
        for name in seconds:
            memory = figures["peak_megabytes"].get(name, [None])[0] if group == "mnist_stored" else None
            number = figures["num_images"][group]
            rows.append((f"{names[group]}: {name}", number, seconds[name], seconds[name] / seconds["plain"], memory))
    common.print_table(("method", "images", "seconds", "in units of plain", "peak memory, MB"), rows)
    print(f"ours with twice the images: {figures['peak_megabytes']['ours'][1]:,.0f} MB at its peak")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the figures of its last line."""
    parser = common.make_parser(__doc__, SIZES)
    parser.add_argument("--measure-memory", choices=("plain", *ways()), help=argparse.SUPPRESS)
    options = common.read_arguments(parser, SIZES, arguments)
    if options.measure_memory:
        megabytes = measure_memory(options)
        print(json.dumps(megabytes))
        return megabytes
    figures = measure(options)
    print_figures(figures)
    return common.finish(figures, BOUNDS, options)


if __name__ == "__main__":
    main()
