"""Measure exact soft counts, and the full matrix of similarities, against what one would put together from other packages.

One random direction of the outputs (d = 1) of the MNIST network of 317,069 parameters, briefly trained, and of a trained
ResNet-20 on CIFAR-10 images. Soft counts in O(P) memory, chunks of 64 images, by

- `vmap_two_pass`: two passes of `torch.func.vmap(grad)`;
- `vmap_jvp`: one pass of `vmap(grad)`, one of forward mode, `torch.func.jvp`;
- `loop`: two passes of a loop over the samples;
- `backpack`: two passes of BackPACK's `BatchGrad`;
- `backpack_norms`: the same with norms by `BatchL2Grad` and the sum by a weighted backward pass;
- `opacus`: two passes of Opacus' `GradSampleModule`;
- `captum`: Captum's `TracInCP`, self-influence and aggregate influence;

the matrix of N × N similarities by `dattri`, exact Grad-Cos.

    python benchmarks/peers.py [--quick] [--data-dir DIRECTORY] [--threads 2]

Every result is held against float64 gradients, one by one, before it is timed, and again after; what is wrong or refuses is
listed with the reason and not timed. All are warmed up and take turns; what each does once, however many images there are, is
not timed: wrapping the network, and in this package looking at its layers, which takes as long as counting 60 to 150 images.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import adapters, common, counting
from benchmarks.adapters import Way
from benchmarks.common import Bound, Seconds, Size
from benchmarks.problems import Problem, cifar, mnist
from lightning_netsim.jacobian.features import GradientFeatures

SIZES = {
    "images": Size(128, 48, "MNIST images counted"),
    "resnet_images": Size(64, 8, "CIFAR-10 images counted"),
    "matrix_images": Size(500, 24, "MNIST images of the matrix of similarities"),
    "rounds": Size(5, 2, "timings of each method"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "speedup_fastest_mnist": Bound(2.0, 3.0, at_least=True),
    "speedup_fastest_resnet20": Bound(1.2, 1.6, at_least=True),
    "speedup_dattri": Bound(10, 30, at_least=True),
}
# What a package says when it cannot do a job.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)

Prepare = Callable[[Problem], Way]

COUNTS: Mapping[str, Prepare] = {
    "vmap_two_pass": lambda problem: partial(counting.vmap_two_pass, problem),
    "vmap_jvp": lambda problem: partial(counting.vmap_jvp, problem),
    "loop": lambda problem: partial(counting.loop, problem),
    "backpack": adapters.backpack,
    "backpack_norms": adapters.backpack_norms,
    "opacus": adapters.opacus,
    "opacus_as_given": adapters.opacus_as_given,
    "captum": adapters.captum,
    "captum_sample_wise": adapters.captum_sample_wise,
}
MATRICES: Mapping[str, Prepare] = {
    # One batch is fastest: the gradients of all images are formed twice, and held twice.
    "dattri": lambda problem: adapters.dattri(problem, batch_size=len(problem)),
    "dattri_as_documented": lambda problem: adapters.dattri(problem, len(problem), hidden_projection=True),
}
# Where it works, it is `opacus`.
NOT_TIMED = ("opacus_as_given",)
PACKAGES = ("backpack", "opacus", "captum", "dattri")


@dataclass(frozen=True, eq=False)
class Job:
    """What is computed, and how far an answer is from the right one.

    Attributes:
        problem: the network and the images.
        ours: how this package does it.
        error_of: the error of an answer, in the unit in which `counting.TOLERANCE` is the most allowed.
    """

    problem: Problem
    ours: Callable[[Problem], Tensor]
    error_of: Callable[[Tensor], float]


@dataclass
class Comparison:
    """What a check found.

    Attributes:
        right: the ways that are right, by name, ours first.
        errors: the error of each that gave an answer.
        refused: why each of the others is not timed.
    """

    right: dict[str, Way] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def counts_of(problem: Problem) -> Job:
    """Return the job of counting the neighbors."""
    exact = counting.exact_rows(problem)
    features = GradientFeatures(problem.network, directions=1, seed=0)
    features(next(iter(problem.chunks())))
    return Job(
        problem, partial(counting.ours, features=features), partial(counting.disagreement, expected=exact @ exact.sum(0))
    )


def matrix_of(problem: Problem) -> Job:
    """Return the job of forming the matrix of similarities, the largest |Δk| its error."""
    rows = counting.exact_rows(problem)
    exact = rows @ rows.T
    return Job(problem, similarity_matrix, lambda similarity: float((similarity.double() - exact).abs().max()))


def similarity_matrix(problem: Problem) -> Tensor:
    """Return the similarity of all pairs of images by this package, shape (N, N), from tiles of the upper triangle."""
    features = GradientFeatures(problem.network, directions=1, seed=0)
    batches = [features(chunk) for chunk in problem.chunks()]
    starts = range(0, len(problem), problem.chunk_size)
    similarity = torch.empty(len(problem), len(problem))
    for number, (row, left) in enumerate(zip(starts, batches, strict=True)):
        for column, right in zip(starts[number:], batches[number:], strict=True):
            tile = left.inner(right)
            similarity[row : row + len(tile), column : column + tile.shape[1]] = tile
            similarity[column : column + tile.shape[1], row : row + len(tile)] = tile.T
    return similarity


def is_installed(peer: str) -> bool:
    """Return whether the package of a peer can be found; what is in torch is always there."""
    return all(importlib.util.find_spec(package) for package in PACKAGES if peer.startswith(package))


def check(job: Job, peers: Mapping[str, Prepare]) -> Comparison:
    """Check this package and all others before any is timed.

    Raises:
        RuntimeError: if this package is wrong.
    """
    found = Comparison({"ours": partial(job.ours, job.problem)})
    found.errors["ours"] = job.error_of(found.right["ours"]())
    if not found.errors["ours"] <= counting.TOLERANCE:
        raise RuntimeError(f"This package is off by {found.errors['ours']:.1e}, more than {counting.TOLERANCE:g}.")
    for name, prepare in peers.items():
        if not is_installed(name):
            found.refused[name] = "not installed"
            continue
        try:
            way = prepare(job.problem)
            found.errors[name] = job.error_of(way())
        except REFUSALS as error:
            found.refused[name] = f"refused: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
            continue
        if not found.errors[name] <= counting.TOLERANCE:
            found.refused[name] = f"wrong: off by {found.errors[name]:.1e}"
        elif name not in NOT_TIMED:
            found.right[name] = way
    return found


def time_right(job: Job, found: Comparison, rounds: int) -> tuple[Seconds, bool]:
    """Return the seconds of what is right, and whether its answers still were in the last round."""
    seconds, answers = common.time_interleaved(found.right, rounds, warm_up=False)  # The check has warmed them up.
    return seconds, all(job.error_of(answer) <= counting.TOLERANCE for answer in answers.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time all jobs; return the figures."""
    digits = mnist(options.data_dir, max(options.images, options.matrix_images), options.steps)
    photos = cifar(options.data_dir, options.resnet_images)
    jobs = {
        "mnist": (counts_of(digits.first(options.images)), COUNTS),
        "resnet20": (counts_of(photos), COUNTS),
        "matrix": (matrix_of(digits.first(options.matrix_images)), {"dattri": MATRICES["dattri"]}),
    }
    figures: dict[str, Any] = {"all_correct": True, "fastest": {}, "peers": {}}
    for name, (job, peers) in jobs.items():
        print(f"{name}: {len(job.problem)} {job.problem.what}; {options.threads} threads.", flush=True)
        found = check(job, peers)
        seconds, still_right = time_right(job, found, options.rounds)
        figures["all_correct"] &= still_right
        figures["peers"][name] = records(found, common.medians(seconds))
        figures |= speedups(name, seconds)
        if name != "matrix":
            figures["fastest"][name] = fastest(seconds)
            figures[f"speedup_fastest_{name}"] = common.ratio(seconds, fastest(seconds), "ours")
    few = check(matrix_of(digits.first(min(32, len(digits)))), {"dattri_as_documented": MATRICES["dattri_as_documented"]})
    figures["peers"]["matrix"] |= {name: record for name, record in records(few, {}).items() if name != "ours"}
    return figures | {
        "num_images": {name: len(job.problem) for name, (job, _) in jobs.items()},
        "images": {name: job.problem.what for name, (job, _) in jobs.items()},
        "chunk_size": digits.chunk_size,
        "rounds": options.rounds,
    }


def records(found: Comparison, seconds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return what is known of each peer: whether it is correct, and its error and seconds, or the reason why it has none."""
    right = {
        name: {"correct": True, "error": found.errors[name], "seconds": value, "in_units_of_ours": value / seconds["ours"]}
        for name, value in seconds.items()
    }
    return right | {name: {"correct": False, "reason": reason} for name, reason in found.refused.items()}


def speedups(name: str, seconds: Seconds) -> dict[str, float]:
    """Return how many times as long as this package each peer takes, under the key of the figure."""
    suffix = "" if name == "matrix" else f"_{name}"
    return {f"speedup_{peer}{suffix}": common.ratio(seconds, peer, "ours") for peer in seconds if peer != "ours"}


def fastest(seconds: Seconds) -> str:
    """Return the fastest of the others."""
    return min((peer for peer in seconds if peer != "ours"), key=lambda peer: median(seconds[peer]))


def print_figures(figures: dict[str, Any]) -> None:
    for job, peers in figures["peers"].items():
        timed = {name: record for name, record in peers.items() if record["correct"]}
        rows = [
            (name, record["seconds"], record["in_units_of_ours"], f"{record['error']:.0e}") for name, record in timed.items()
        ]
        common.print_table((f"{job}, {figures['num_images'][job]} images", "seconds", "in units of ours", "error"), rows)
        for name, record in peers.items():
            if not record["correct"]:
                print(f"{name}: {record['reason']}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the figures of its last line."""
    options = common.read_arguments(common.make_parser(__doc__, SIZES), SIZES, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What other packages call, and will have to change, is their affair.
        figures = measure(options)
    print_figures(figures)
    return common.finish(figures, BOUNDS, options)


if __name__ == "__main__":
    main()
