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

import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import adapters, counting
from benchmarks.adapters import Way
from benchmarks.problems import Problem, cifar, mnist
from lab import Bound, Seconds, Size, Study, format_number, medians, ratio, script, time_interleaved
from lightning_netsim.jacobian.features import GradientFeatures

SIZES = {
    "images": Size(128, 48, "MNIST images counted"),
    "resnet_images": Size(64, 8, "CIFAR-10 images counted"),
    "matrix_images": Size(500, 24, "MNIST images of the matrix of similarities"),
    "rounds": Size(5, 2, "timings of each method"),
    "steps": Size(300, 20, "training steps of the MNIST network"),
}
BOUNDS = {
    "speedup_fastest_mnist": Bound(2.0, 3.0, True, "soft counts against the fastest correct peer, same memory, MNIST network"),
    "speedup_fastest_resnet20": Bound(1.2, 1.6, True, "the same, ResNet-20"),
    "speedup_dattri": Bound(10, 30, True, "matrix of all similarities against dattri's exact Grad-Cos"),
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
# One batch is fastest: the gradients of all images are formed twice, and held twice.
MATRIX: Mapping[str, Prepare] = {"dattri": lambda problem: adapters.dattri(problem, batch_size=len(problem))}
AS_DOCUMENTED: Mapping[str, Prepare] = {
    "dattri_as_documented": lambda problem: adapters.dattri(problem, len(problem), hidden_projection=True)
}
# Where it works, it is `opacus`.
NOT_TIMED = ("opacus_as_given",)
PACKAGES = ("backpack", "opacus", "captum", "dattri")


@dataclass(eq=False)
class Comparison:
    """What is computed by this package and by others.

    Attributes:
        problem: the network and the images.
        error_of: the error of an answer, in the unit in which `counting.TOLERANCE` is the most allowed.
        right: the ways that are right, by name; ours first.
        errors: the error of each that gave an answer.
        refused: why each of the others is not timed.
        seconds: what the right ones take.
    """

    problem: Problem
    error_of: Callable[[Tensor], float]
    right: dict[str, Way]
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=dict)

    def check(self, peers: Mapping[str, Prepare]) -> Comparison:
        """Check this package and all others before any is timed.

        Raises:
            RuntimeError: if this package is wrong.
        """
        self.errors["ours"] = self.error_of(self.right["ours"]())
        if not self.errors["ours"] <= counting.TOLERANCE:
            raise RuntimeError(f"This package is off by {self.errors['ours']:.1e}, more than {counting.TOLERANCE:g}.")
        for name, prepare in peers.items():
            if not is_installed(name):
                self.refused[name] = "not installed"
                continue
            try:
                way = prepare(self.problem)
                self.errors[name] = self.error_of(way())
            except REFUSALS as error:
                self.refused[name] = f"refused: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
                continue
            if not self.errors[name] <= counting.TOLERANCE:
                self.refused[name] = f"wrong: off by {self.errors[name]:.1e}"
            elif name not in NOT_TIMED:
                self.right[name] = way
        return self

    def time(self, rounds: int) -> bool:
        """Time what is right; return whether its answers still were in the last round."""
        self.seconds, answers = time_interleaved(self.right, rounds, warm_up=False)  # The check has warmed them up.
        return all(self.error_of(answer) <= counting.TOLERANCE for answer in answers.values())

    @property
    def fastest(self) -> str:
        """The fastest of the others."""
        return min((peer for peer in self.seconds if peer != "ours"), key=lambda peer: median(self.seconds[peer]))

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each: whether it is correct, and its error and seconds, or the reason why it has none."""
        typical = medians(self.seconds)
        right = {
            name: {"correct": True, "error": self.errors[name], "seconds": value, "in_units_of_ours": value / typical["ours"]}
            for name, value in typical.items()
        }
        return right | {name: {"correct": False, "reason": reason} for name, reason in self.refused.items()}


def counts_of(problem: Problem) -> Comparison:
    """Return the job of counting the neighbors."""
    exact = counting.exact_rows(problem)
    features = GradientFeatures(problem.network, directions=1, seed=0)
    features(next(iter(problem.chunks())))
    error_of = partial(counting.disagreement, expected=exact @ exact.sum(0))
    return Comparison(problem, error_of, {"ours": partial(counting.ours, problem, features=features)})


def matrix_of(problem: Problem) -> Comparison:
    """Return the job of forming the matrix of similarities, the largest |Δk| its error."""
    rows = counting.exact_rows(problem)
    exact = rows @ rows.T
    error_of = lambda similarity: float((similarity.double() - exact).abs().max())  # noqa: E731
    return Comparison(problem, error_of, {"ours": partial(similarity_matrix, problem)})


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


@script(SIZES, BOUNDS, threads=2, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Check and time all jobs."""
    options = study.options
    digits = mnist(options.data_dir, max(options.images, options.matrix_images), options.steps)
    photos = cifar(options.data_dir, options.resnet_images)
    jobs = {
        "mnist": (counts_of(digits.first(options.images)), COUNTS),
        "resnet20": (counts_of(photos), COUNTS),
        "matrix": (matrix_of(digits.first(options.matrix_images)), MATRIX),
    }
    figures: dict[str, Any] = {"all_correct": True, "fastest": {}, "peers": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What other packages call, and will have to change, is their affair.
        for name, (job, peers) in jobs.items():
            print(f"{name}: {len(job.problem)} {job.problem.what}; {options.threads} threads.", flush=True)
            figures["all_correct"] &= job.check(peers).time(options.rounds)
            figures["peers"][name] = job.records()
            suffix = "" if name == "matrix" else f"_{name}"
            others = [peer for peer in job.seconds if peer != "ours"]
            figures |= {f"speedup_{peer}{suffix}": ratio(job.seconds, peer, "ours") for peer in others}
            if name != "matrix":
                figures["fastest"][name] = job.fastest
                figures[f"speedup_fastest_{name}"] = ratio(job.seconds, job.fastest, "ours")
        few = matrix_of(digits.first(min(32, len(digits)))).check(AS_DOCUMENTED)
    figures["peers"]["matrix"] |= few.records()
    figures["num_images"] = {name: len(job.problem) for name, (job, _) in jobs.items()}
    figures |= {"images": {name: job.problem.what for name, (job, _) in jobs.items()}, "options": study.sizes}
    report(study, figures)
    return figures


def report(study: Study, figures: dict[str, Any]) -> None:
    peers, numbers = figures["peers"], figures["num_images"]
    jobs = {"mnist": "counts, MNIST", "resnet20": "counts, ResNet-20", "matrix": "matrix, MNIST"}
    cells: dict[str, dict[str, str]] = {}
    reasons = []
    for job, label in jobs.items():
        for name, record in peers[job].items():
            cells.setdefault(name, {})[job] = "not timed"
            if record["correct"]:
                cells[name][job] = f"{format_number(record['in_units_of_ours'])} ({format_number(record['seconds'])} s)"
            else:
                reasons.append((f"`{name}`", f"{label}, {numbers[job]} images", record["reason"]))
    rows = [(f"`{name}`", *(found.get(job) for job in jobs)) for name, found in cells.items()]
    study.table("peers", ("peer", *(f"{label}, {numbers[job]} images" for job, label in jobs.items())), rows)
    study.table("peers_not_timed", ("peer", "job", "not timed, because"), reasons, left=3)


if __name__ == "__main__":
    main()
