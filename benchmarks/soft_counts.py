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
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import counting
from benchmarks.problems import Problem, cifar, mnist
from lab import Bound, Seconds, Size, Study, medians, ratio, ratios, script, time_interleaved

SIZES = {
    "images": Size(10_000, 256, "MNIST images counted in two sweeps"),
    "stored_images": Size(1024, 128, "MNIST images of the comparison with stored gradients, which must fit into memory"),
    "resnet_images": Size(1000, 64, "CIFAR-10 images"),
    "rounds": Size(5, 3, "timings of each method"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "ratio_plain": Bound(3.0, 2.3, what="exact soft counts in O(P) memory, MNIST network, in passes forward and backward"),
    "ratio_plain_resnet20": Bound(2.7, 2.1, what="the same, ResNet-20"),
    "ratio_plain_stored": Bound(1.9, 1.4, what="the same where all gradients are stored, MNIST network"),
    "speedup_vmap_two_pass": Bound(3.0, at_least=True, what="soft counts against two passes of `vmap(grad)`, MNIST network"),
    "peak_growth": Bound(1.2, what="peak memory of soft counts, images doubled"),
}
PLAIN_CHUNKS = (64, 128, 256)
NETWORKS = {"mnist": "MNIST network", "mnist_stored": "MNIST network", "resnet20": "ResNet-20"}

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
    functions: dict[str, Callable[[], Any]] = {"plain": partial(counting.plain, problem)}
    functions |= {f"plain_{size}": partial(counting.plain, problem, size) for size in plain_chunks}
    functions |= {name: partial(way, problem) for name, way in compared.items()}
    return time_interleaved(functions, rounds, warm_up=False)[0]


def weigh(options: argparse.Namespace, method: str) -> Callable[[], object]:
    """Return a method of counting all images; weights make no difference to memory, and stay initial."""
    return partial({"plain": counting.plain, **ways()}[method], mnist(options.data_dir, options.images, steps=0))


def weigh_all(study: Study, methods: Sequence[str]) -> dict[str, list[float]]:
    """Return the peak growth of memory in MB of each method; of ours also with twice the images."""
    number = study.options.stored_images
    jobs = [("ours", number), ("ours", 2 * number), *((name, number) for name in methods)]
    once, twice, *others = study.peaks([([name], {"images": images}) for name, images in jobs])
    return {"ours": [once, twice]} | {name: [peak] for name, peak in zip(methods, others, strict=True)}


@script(SIZES, BOUNDS, threads=2, weigh=weigh, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Check, time and weigh all methods."""
    options, every = study.options, ways()
    digits = mnist(options.data_dir, options.images, options.steps)
    few, photos = digits.first(options.stored_images), cifar(options.data_dir, options.resnet_images)
    two_sweeps = {"ours": every["ours"]}
    print(f"{len(digits):,} and {len(few):,} {digits.what}; {len(photos):,} {photos.what}; {options.threads} threads.")
    checked = {name: every[name] for name in ("ours", "vmap_two_pass")}
    errors = {"mnist": largest_disagreement(few, every), "resnet20": largest_disagreement(photos.first(256), checked)}
    seconds = {
        "mnist": time_ways(digits, two_sweeps, options.rounds),
        "mnist_stored": time_ways(few, every, options.rounds, PLAIN_CHUNKS),
        "resnet20": time_ways(photos, two_sweeps, options.rounds),
    }
    # A process takes seconds to start.
    peaks = weigh_all(study, () if options.quick else ("plain", *(name for name in every if name != "ours")))
    figures = figures_of(seconds, peaks) | {
        "disagreement": errors,
        "images": {"mnist": digits.what, "resnet20": photos.what},
        "num_images": {"mnist": len(digits), "mnist_stored": len(few), "resnet20": len(photos)},
        "num_parameters": {"mnist": digits.num_parameters, "resnet20": photos.num_parameters},
        "chunk_size": digits.chunk_size,
        "rounds": options.rounds,
    }
    report(study, figures)
    return figures


def figures_of(seconds: dict[str, Seconds], peaks: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios of seconds and of bytes."""
    many, few, photos = seconds["mnist"], seconds["mnist_stored"], seconds["resnet20"]
    fastest = min((f"plain_{size}" for size in PLAIN_CHUNKS), key=lambda name: median(few[name]))
    spread = ratios(many, "ours", "plain")
    return {
        "ratio_plain": ratio(many, "ours", "plain"),
        "ratio_plain_range": [round(spread[0], 2), round(spread[-1], 2)],
        "ratio_plain_fastest_chunk": ratio(few, "ours", fastest),
        "fastest_plain_chunk": int(fastest.removeprefix("plain_")),
        "ratio_plain_resnet20": ratio(photos, "ours", "plain"),
        "ratio_plain_stored": ratio(few, "ours_stored", "plain"),
        "speedup_vmap_two_pass": ratio(few, "vmap_two_pass", "ours"),
        "speedup_vmap_stored": ratio(few, "vmap_stored", "ours"),
        "peak_growth": round(peaks["ours"][1] / peaks["ours"][0], 3),
        "peak_megabytes": peaks,
        "median_seconds": {name: medians(each) for name, each in seconds.items()},
    }


def report(study: Study, figures: dict[str, Any]) -> None:
    rows = []
    for group, seconds in figures["median_seconds"].items():
        for name in [name for name in seconds if not name.startswith("plain_")]:
            memory = figures["peak_megabytes"].get(name, [None])[0] if group == "mnist_stored" else None
            number, label = figures["num_images"][group], f"{NETWORKS[group]}: `{name}`"
            rows.append((label, number, seconds[name], seconds[name] / seconds["plain"], memory))
    study.table("soft_counts", ("method", "images", "median seconds", "in units of plain", "peak growth of memory, MB"), rows)
    rows = [
        ("`ratio_plain` in single rounds", "{} to {}".format(*figures["ratio_plain_range"])),
        ("`plain` is fastest in chunks of", figures["fastest_plain_chunk"]),
        ("`ours` in units of that", figures["ratio_plain_fastest_chunk"]),
        ("`vmap(grad)` with all gradients stored, in units of `ours`", figures["speedup_vmap_stored"]),
        ("the ways of counting agree to", f"{max(figures['disagreement'].values()):.0e}"),
    ]
    study.table("soft_counts_more", ("", "measured"), rows)


if __name__ == "__main__":
    main()
