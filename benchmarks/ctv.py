"""What the CTV norm costs beside forms that hold all pairs, and what aligning differences adds to a training step.

    python benchmarks/ctv.py [--quick] [--differences 4096] [--coordinates 128] [--threads 2]

The norm of H differences m_k of h coordinates and its gradient, by

- `ours`: `ctv_norm`;
- `pairs`: `m[first] - m[second]` of the H(H − 1)/2 pairs, the vectorized pairwise form with the fewest numbers, which holds
  three to four times 2H²h bytes in float32;
- `broadcast`: `m.unsqueeze(1) - m.unsqueeze(0)`, its common form, twice as large: of half as many differences;
- `pdist`: `torch.pdist`, which never forms the pairwise differences and holds 2H² bytes a few times.

`speedup_pairwise` is `pairs` over `ours` of the L1 or the squared norm, the lesser. Where `pairs` needs more memory than is
free, it is not measured. Of 16,384 differences ours is run, and what the pairwise form would need is counted.

A training step is forward, backward and Adam on the MNIST network with 64 outputs, with the N-pair or the Proxy-Anchor loss;
`regularizer_ratio` is that with `DifferenceAlignmentLoss()` over that without, the greater of the two. The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problems import Function, largest_difference, mnist, value_and_gradients
from lab import Bound, Seconds, Size, Study, medians, ratio, script, time_interleaved
from lightning_netsim.demos import MNISTNetwork
from lightning_netsim.functional import ctv_norm
from lightning_netsim.losses import DifferenceAlignmentLoss, MetricLearningLoss

SIZES = {
    "differences": Size(4096, 256, "differences whose norm is computed, H"),
    "coordinates": Size(128, 16, "coordinates of each, h"),
    "many": Size(16_384, 1024, "differences of which no machine at hand holds all pairs"),
    "rounds": Size(3, 2, "timings of each form of the norm"),
    "images": Size(256, 32, "images in a batch"),
    "steps": Size(31, 3, "timings of each training step"),
}
BOUNDS = {
    "speedup_pairwise": Bound(30, at_least=True, what="CTV norm and its gradient against the vectorized pairwise form"),
    "regularizer_ratio": Bound(1.15, what="training step with the alignment of differences, in units of the same without"),
}
NORMS = ("l1", "squared_l2", "l2")
HELD_AT_ONCE = 4
"""Of the tensor of all pairs, that the pairwise form of the squared norm holds in its backward pass: measured."""
TOLERANCE = 1e-10
EMBEDDING_SIZE, NUM_CLASSES, WEIGHT = 64, 10, 1.0

SUMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda gaps: gaps.abs().sum(),
    "squared_l2": lambda gaps: gaps.square().sum(),
    "l2": lambda gaps: torch.linalg.vector_norm(gaps, dim=-1).sum(),
}


def by_pairs(differences: Tensor, norm: str) -> Tensor:
    first, second = torch.triu_indices(len(differences), len(differences), offset=1)
    return SUMS[norm](differences[first] - differences[second])


def by_broadcast(differences: Tensor, norm: str) -> Tensor:
    return SUMS[norm](differences.unsqueeze(1) - differences.unsqueeze(0)) / 2


def by_pdist(differences: Tensor, norm: str) -> Tensor:
    distances = torch.pdist(differences, p=1 if norm == "l1" else 2)
    return distances.square().sum() if norm == "squared_l2" else distances.sum()


FORMS: Mapping[str, Function] = {"ours": ctv_norm, "pairs": by_pairs, "broadcast": by_broadcast, "pdist": by_pdist}
"""(differences (H, h), norm) -> the sum over the pairs."""


def random_differences(number: int, coordinates: int) -> Tensor:
    """Return differences, shape (H, h), always the same."""
    return torch.randn(number, coordinates, generator=torch.Generator().manual_seed(0))


def computation(form: str, differences: Tensor, norm: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return what computes a norm and its gradient by one form."""
    return partial(value_and_gradients, partial(FORMS[form], norm=norm), differences)


def largest_disagreement(forms: Iterable[Function], differences: Tensor) -> float:
    """Return by how much the forms differ from the first in value and gradient, relatively.

    Raises:
        RuntimeError: if it is above the tolerance.
    """
    largest = max(largest_difference([partial(form, norm=norm) for form in forms], differences) for norm in NORMS)
    if not largest <= TOLERANCE:
        raise RuntimeError(f"The forms of the norm disagree by {largest:.1e}, more than {TOLERANCE:g}.")
    return largest


def pair_bytes(number: int, coordinates: int) -> int:
    """Return the bytes of one float32 tensor of all pairwise differences: H(H − 1)/2 · h · 4."""
    return number * (number - 1) // 2 * coordinates * 4


def time_forms(number: int, options: argparse.Namespace, forms: Sequence[str]) -> dict[str, Seconds]:
    """Return the seconds of value and gradient by each form, for each norm; L2 without the forms that hold all pairs."""
    differences, seconds = random_differences(number, options.coordinates), {}
    for norm in NORMS:
        functions = {form: computation(form, differences, norm) for form in forms if norm != "l2" or form in ("ours", "pdist")}
        if len(functions) > 1:
            # The check has warmed them up; tensors of gigabytes are new to the process each time.
            seconds[norm] = time_interleaved(functions, options.rounds, warm_up=False)[0]
    return seconds


def measure_norm(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time all forms of the norm."""
    error = largest_disagreement(FORMS.values(), random_differences(65, options.coordinates).double())
    needed = HELD_AT_ONCE * pair_bytes(options.differences, options.coordinates)
    fits = 1.1 * needed < psutil.virtual_memory().available
    if not fits:
        print(f"All pairs of {options.differences:,} differences need {needed / 1e9:.0f} GB, more than is free: not measured.")
    seconds = time_forms(options.differences, options, ("ours", "pairs", "pdist") if fits else ("ours", "pdist"))
    halved = time_forms(options.differences // 2, options, ("ours", "broadcast"))
    timed = {"pairs": seconds, "pdist": seconds, "broadcast": halved}
    speedups = {
        form: {norm: ratio(each, form, "ours") for norm, each in found.items() if form in each} for form, found in timed.items()
    }
    return {
        "speedup_pairwise": min(speedups["pairs"].values()) if fits else None,
        "speedups": speedups,
        "median_seconds": {norm: medians(each) for norm, each in seconds.items()},
        "median_seconds_half": {norm: medians(each) for norm, each in halved.items()},
        "disagreement": error,
    }


def weigh(options: argparse.Namespace, norm: str) -> Callable[[], object]:
    """Return the computation of one norm of many differences; a small one comes first."""
    differences = random_differences(options.many, options.coordinates)
    computation("ours", differences[:64], norm)()
    return computation("ours", differences, norm)


class Step:
    """A training step on embeddings, with or without the alignment of their differences.

    Args:
        images: shape (B, 1, 28, 28).
        loss: what is trained by.
        alignment: what is added, if anything.
    """

    def __init__(self, images: Tensor, loss: MetricLearningLoss, alignment: DifferenceAlignmentLoss | None = None) -> None:
        self.images, self.labels = images, torch.arange(len(images)) % NUM_CLASSES
        self.loss, self.alignment = loss, alignment
        self.network = nn.Sequential(*list(MNISTNetwork())[:-1], nn.Linear(256, EMBEDDING_SIZE))
        self.optimizer = torch.optim.Adam([*self.network.parameters(), *loss.parameters()], lr=1e-5)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        embeddings = self.network(self.images)
        value = self.loss(embeddings, self.labels)
        if self.alignment is not None:
            value = value + WEIGHT * self.alignment(embeddings, self.labels)
        value.backward()
        self.optimizer.step()


LOSSES: Mapping[str, Callable[[], MetricLearningLoss]] = {
    "n_pair": lambda: MetricLearningLoss("NPairsLoss"),
    "proxy_anchor": lambda: MetricLearningLoss(
        "ProxyAnchorLoss", {"num_classes": NUM_CLASSES, "embedding_size": EMBEDDING_SIZE}
    ),
}
ALIGNMENTS: Mapping[str, Callable[[], DifferenceAlignmentLoss | None]] = {
    "plain": lambda: None,
    "chain": DifferenceAlignmentLoss,
    "all_pairs": lambda: DifferenceAlignmentLoss(pairs="all"),
    "vectors": lambda: DifferenceAlignmentLoss("abs", "l2"),
}


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Time training steps with and without the alignment."""
    inputs = mnist(options.data_dir, options.images, steps=0).inputs()
    found, ratios = {}, {}
    for name, loss in LOSSES.items():
        steps = {kind: Step(inputs, loss(), alignment()) for kind, alignment in ALIGNMENTS.items()}
        for step in steps.values():  # Twice: the first step of Adam makes its state.
            step()
        seconds, _ = time_interleaved(steps, options.steps)
        found[name], ratios[name] = medians(seconds), {kind: ratio(seconds, kind, "plain") for kind in steps}
    return {
        "regularizer_ratio": max(each["chain"] for each in ratios.values()),
        "regularizer_ratios": ratios,
        "median_seconds_step": found,
    }


@script(SIZES, BOUNDS, threads=2, weigh=weigh, page="benchmarks")
def main(study: Study) -> dict[str, Any]:
    """Time training steps, the norm, and our form where the pairwise one has no room."""
    options = study.options
    figures = measure_steps(options) | measure_norm(options)
    differences = random_differences(options.many, options.coordinates)
    functions = {norm: computation("ours", differences, norm) for norm in NORMS}
    figures |= {
        "seconds_many": medians(time_interleaved(functions, rounds=1, warm_up=False)[0]),
        "peak_megabytes_many": dict(zip(NORMS, study.peaks([([norm], {}) for norm in NORMS]), strict=True)),
        "pair_megabytes_many": round(pair_bytes(options.many, options.coordinates) / 1e6),
        "machine_megabytes": round(psutil.virtual_memory().total / 1e6),
        "options": study.sizes,
    }
    rows = [
        (f"`{form}`, `{norm}`", number, 1000 * value, value / seconds["ours"])
        for number, key in ((options.differences, "median_seconds"), (options.differences // 2, "median_seconds_half"))
        for norm, seconds in figures[key].items()
        for form, value in seconds.items()
    ]
    study.table("ctv", ("form", "differences", "milliseconds", "in units of ours"), rows)
    rows = [(f"`ours`, `{norm}`", figures["seconds_many"][norm], figures["peak_megabytes_many"][norm]) for norm in NORMS]
    rows += [("one tensor of all pairs", None, figures["pair_megabytes_many"])]
    rows += [("memory of this machine", None, figures["machine_megabytes"])]
    study.table("ctv_many", (f"{options.many:,} differences", "seconds", "MB"), rows)
    rows = [
        (f"`{loss}`, `{kind}`", 1000 * value, figures["regularizer_ratios"][loss][kind])
        for loss, seconds in figures["median_seconds_step"].items()
        for kind, value in seconds.items()
    ]
    study.table("ctv_steps", ("loss, alignment", "milliseconds", "in units of plain"), rows)
    return figures


if __name__ == "__main__":
    main()
