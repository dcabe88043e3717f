"""Label noise against the number of augmented copies: does it fall with the square root of their number?

After Charpiat et al., NeurIPS 2019, section 7 of the supplementary material: copies of an image, each with a label of its own
noise, are neighbors, and a network averages the labels of neighbors; so noise is to fall by √(number of copies), as the
denoising factor ‖k^IN(·, x_i)‖ says. Digits of MNIST, each 1, 2, 4, 8 or 16 times. To be learned are the amount of ink and the
elongation of a digit ("values", which do not change as it is moved or turned; Gaussian noise as large as their spread), or its
class ("classes", 40 % replaced by another one). Copies are identical, or moved and turned a little, or, as a control, no copies
but other digits; noise is drawn for each copy, or, as another control, once for each digit.

Noise is told from what the network cannot fit by twins, trained from the same weights on the same batches and other labels: of
the difference of their labels, how much is left in their outputs? The twin of noisy values has the true ones, that of noisy
classes has classes with other noise.

    python experiments/augmentation_denoises.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Beside the tables it writes a figure and every run (a CSV for each setting). Runs that stand in these files already are not
repeated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.noisy_targets import CLASSES, Kernel, loss_of, seeded, train_together
from lab import Mean, RunLog, Size, Study, mean_of, script
from lab.affine import transform
from lab.data import Labeled, read_mnist
from lab.figures import panels
from lab.training import take_step
from lightning_netsim.report import style

COPIES = (1, 2, 4, 8, 16)
# What is learned, and from which copies; and how a table calls it.
SETTINGS = {
    ("values", "identical"): "values, identical copies",
    ("values", "moved"): "values, copies moved and turned",
    ("values", "different"): "values, other digits in place of copies",
    ("classes", "moved"): "classes, copies moved and turned",
}
NAMES = tuple(" ".join(setting) for setting in SETTINGS)
SIZES = {
    "settings": Size(NAMES, None, "what is learned, and from which copies", choices=NAMES),
    "digits": Size(100, 20, "digits, each of which is copied"),
    "lengths": Size((100, 300, 900), (10, 50), "steps of the trainings"),
    "seeds": Size(range(100, 105), (100,), "of digits, noise and networks"),
}
NOISES = ("independent", "shared")
WRONG = 0.4
# How far a copy is turned, in radians, and moved, as a share of half the side: up to 7.5 degrees and a pixel of 28.
TURN, SHIFT = math.pi / 24, 2 / 28
SIDE = 14
QUERIES = 50


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move and turn images, shape (N, 1, S, S), each at random."""
    angle, right, down = (2 * torch.rand(3, len(images), generator=generator) - 1) * torch.tensor([[TURN], [SHIFT], [SHIFT]])
    rows = [torch.stack([angle.cos(), -angle.sin(), right], 1), torch.stack([angle.sin(), angle.cos(), down], 1)]
    return transform(images, torch.stack(rows, 1))


def moments(images: Tensor) -> Tensor:
    """Return the ink of images and the log ratio of the axes of its spread, shape (N, 2): turning changes neither."""
    ink = images[:, 0].double()
    mass, places = ink.sum((1, 2)), torch.arange(ink.shape[1], dtype=torch.float64)
    down, right = (places - (ink.sum(dim) @ places / mass).unsqueeze(1) for dim in (2, 1))
    spread_down, spread_right = ((ink.sum(dim) * offset**2).sum(1) / mass for dim, offset in ((2, down), (1, right)))
    mixed = torch.einsum("nij,ni,nj->n", ink, down, right) / mass
    middle, half = (spread_down + spread_right) / 2, ((spread_down - spread_right) ** 2 / 4 + mixed**2).sqrt()
    return torch.stack([mass, ((middle + half) / (middle - half)).log() / 2], 1)


@dataclass(frozen=True)
class Copies:
    """Digits, `copies` of each in a row, what is true of them, and labels to learn from, with those of the twin.

    Attributes:
        inputs: shape (N, 1, 14, 14).
        unseen: shape (N₀, 1, 14, 14): one more copy of each digit, or other digits, without labels.
        truth: shape (N, 2), or (N,) classes.
        labels: by the name of the noise, those of network and twin.
    """

    inputs: Tensor
    unseen: Tensor
    truth: Tensor
    labels: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def make(cls, task: str, kind: str, digits: Labeled, number: int, copies: int, seed: int) -> Copies:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits[0]), generator=generator)
        chosen, held_out = order[: number * copies], order[-number:]
        if kind != "different":
            chosen = held_out = order[:number].repeat_interleave(copies)
            held_out = held_out[::copies]
        images, unseen = digits[0][chosen], digits[0][held_out]
        if kind == "moved":
            images, unseen = turned(images, generator), turned(unseen, generator)
        if task == "values":
            # Scaled by all digits, so that each set of them is asked for the same.
            every = moments(digits[0][order[:5000]])
            truth = ((moments(digits[0][chosen]) - every.mean(0)) / every.std(0)).float()
        else:
            truth = digits[1][chosen]
        own = {name: torch.arange(len(truth)) // (copies if name == "shared" else 1) for name in NOISES}
        labels = {name: _noisy(truth, groups, generator) for name, groups in own.items()}
        return cls(F.avg_pool2d(images, 2), F.avg_pool2d(unseen, 2), truth, labels)


def _noisy(truth: Tensor, groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labels with noise that is the same within a group, and those of the twin."""
    count = int(groups.max()) + 1
    if truth.is_floating_point():
        return truth + torch.randn(count, truth.shape[1], generator=generator)[groups], truth
    pair = []
    for _ in range(2):
        wrong = torch.rand(count, generator=generator)[groups] < WRONG
        by = torch.randint(1, CLASSES, (count,), generator=generator)[groups]
        pair.append(torch.where(wrong, (truth + by) % CLASSES, truth))
    return pair[0], pair[1]


def fitted(outputs: Tensor, like: Tensor) -> Tensor:
    """Return what the loss compares with labels: the outputs, or probabilities."""
    return outputs if like.is_floating_point() else outputs.softmax(1)


def as_rows(labels: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else F.one_hot(labels, CLASSES).float()


def size_of(values: Tensor) -> float:
    """Return the root mean square."""
    return float(values.square().mean().sqrt())


def wrongness(outputs: Tensor, truth: Tensor) -> float:
    """Return the root mean square error, or the share of wrong classes."""
    return size_of(outputs - truth) if truth.is_floating_point() else float((outputs.argmax(1) != truth).float().mean())


def shared_factor(kernel: Kernel, queries: Tensor, copies: int) -> Tensor:
    """Return what is left of noise that the copies of a digit share, √(Σ_b ‖Σ_{j in b} a_ij‖²_F/D), shape (Q,)."""
    pairs = kernel.jacobian.select(queries).inner(kernel.jacobian).double()
    weights = torch.linalg.solve(pairs.sum(1).unsqueeze(1), pairs.unflatten(1, (-1, copies)).sum(2))
    return (weights.square().sum((1, 2, 3)) / pairs.shape[2]).sqrt()


def run(
    setting: tuple[str, str],
    digits: Labeled,
    number: int,
    copies: int,
    lengths: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, float]:
    """Return, for each seed, the noise left after trainings of several lengths, and what the kernel says after the longest."""
    sets = [Copies.make(*setting, digits, number, copies, seed) for seed in seeds]
    # One copy has no other to share its noise with, and another digit shares none.
    noises = NOISES[:1] if copies == 1 or setting[1] == "different" else NOISES
    twins = {noise: "true" if setting[0] == "values" else f"{noise} twin" for noise in noises}
    labels = {noise: [data.labels[noise][0] for data in sets] for noise in noises}
    labels |= {twins[noise]: [data.labels[noise][1] for data in sets] for noise in noises}
    inputs = torch.stack([data.inputs for data in sets]).repeat(len(labels), 1, 1, 1, 1)
    targets = torch.stack([one for some in labels.values() for one in some])
    found: dict[str, float] = {}
    for steps in lengths:
        networks = {
            name: [seeded(seed, 1, SIDE, 2 if setting[0] == "values" else CLASSES) for seed in seeds] for name in labels
        }
        train_together([one for some in networks.values() for one in some], inputs, targets, steps, [*seeds] * len(labels))
        for place, (data, seed) in enumerate(zip(sets, seeds, strict=True)):
            for noise in noises:
                pair = networks[noise][place], networks[twins[noise]][place]
                figures = measure(data, noise, *pair, copies, seed if steps == max(lengths) else None)
                found |= {f"{seed} {noise}_{name}_{steps}": value for name, value in figures.items()}
            if copies == 1 and setting[1] != "different":
                same = {name: found[f"{seed} independent_{name}_{steps}"] for name in ("noise", "unseen", "error")}
                found |= {f"{seed} shared_{name}_{steps}": value for name, value in same.items()}
    return found


def measure(data: Copies, noise: str, network: nn.Module, twin: nn.Module, copies: int, seed: int | None) -> dict[str, float]:
    """Return the noise that is left, and with a seed, if noise is independent, what the kernel says of some samples."""
    difference = torch.sub(*map(as_rows, data.labels[noise]))
    with torch.no_grad():
        (outputs, unseen), (others, others_unseen) = (
            [fitted(some(x), data.truth) for x in (data.inputs, data.unseen)] for some in (network, twin)
        )
    left, given = outputs - others, size_of(difference)
    figures = {"noise": size_of(left) / given, "unseen": size_of(unseen - others_unseen) / given}
    figures["error"] = wrongness(outputs, data.truth)
    if noise == "shared":
        return figures
    figures["twin_error"] = wrongness(others, data.truth)
    if seed is not None:
        queries = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[:QUERIES]
        figures |= kernel_figures(Kernel(network, data.inputs), queries, copies, difference / given, left / given)
    return figures


def kernel_figures(kernel: Kernel, queries: Tensor, copies: int, difference: Tensor, left: Tensor) -> dict[str, float]:
    """Return the denoising factors, of all outputs together and of each with negative weights put to 0, and the averages."""
    average, single = (kernel.average(difference, left, queries, name) for name in ("matrix", "outputs"))
    assert single.clamped is not None  # The kernel of single outputs always says.
    return {
        "factor": float(average.factor.mean()),
        "positive_factor": float(single.factor.mean()),
        "clamped": float(single.clamped.mean()),
        "shared_factor": float(shared_factor(kernel, queries, copies).mean()),
        "averaged_labels": size_of(average.smoothed_targets),
        "averaged_outputs": size_of(average.smoothed_outputs),
    }


class Invariant(nn.Module):
    """A network that cannot tell an image from its four quarter turns: the mean of what another says of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.network(images.rot90(number, (2, 3))) for number in range(4)]).mean(0)


def exact_law(digits: Labeled, seed: int, number: int = 20, steps: int = 50) -> dict[str, float]:
    """Test the law where the network sees copies as identical, in float64: by gradient descent on all samples at once.

    Returns:
        the largest difference between outputs after training on copies, and on one of each with the mean of their labels; and
        the largest deviation of √copies times the denoising factor from what it is without copies.
    """
    generator = torch.Generator().manual_seed(seed)
    images = F.avg_pool2d(digits[0][torch.randperm(len(digits[0]), generator=generator)[:number]], 2).double()
    found = {"outputs": 0.0, "factor": 0.0}
    for copies in COPIES:
        many = images.repeat_interleave(copies, 0)
        if copies == 4:
            many = torch.stack([images.rot90(turn, (2, 3)) for turn in range(4)], 1).flatten(0, 1)
        labels = torch.randn(number, copies, 2, generator=generator, dtype=torch.float64)
        results = []
        for inputs, targets in ((many, labels.flatten(0, 1)), (images, labels.mean(1))):
            network = Invariant(seeded(seed, 1, SIDE, 2).double())
            optimizer = torch.optim.SGD(network.parameters(), 0.05)
            for _ in range(steps):
                take_step(optimizer, loss_of(network(inputs), targets))
            kernel = Kernel(network, inputs)
            factor = kernel.average(targets, targets, torch.arange(len(inputs))[:: len(inputs) // number]).factor
            results.append((network(images).detach(), factor * math.sqrt(len(inputs) / number)))
        for name, one, other in zip(found, *results, strict=True):
            found[name] = max(found[name], float((one - other).abs().max()))
    return found


def slope(copies: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log values against log copies."""
    return float(np.polyfit(np.log(copies), np.log(values), 1)[0])


def summarize(rows: dict[int, list[dict[str, float]]], lengths: Sequence[int]) -> dict[str, Any]:
    """Return, of one setting, means by copies, and slopes against them, each with its standard error over the seeds."""
    means: dict[str, dict[str, Mean]] = {}
    slopes = {}
    for name in rows[max(rows)][0]:
        means[name] = {str(copies): round(mean_of(some, name), 5) for copies, some in rows.items()}
        if name.rsplit("_", 1)[0].endswith(("noise", "unseen", "factor", "averaged_labels", "averaged_outputs")):
            seeds = zip(*([row[name] for row in some] for some in rows.values()), strict=True)
            slopes[name] = round(mean_of([slope(list(rows), some) for some in seeds]), 4)
    return {"means": means, "slope": slopes, "lengths": list(lengths)}


def write_table(study: Study, setting: tuple[str, str], summary: dict[str, Any]) -> None:
    """Write what is left of the noise, and errors, by the number of copies."""
    last, error = summary["lengths"][-1], "error (RMSE)" if setting[0] == "values" else "share wrong"
    names = {f"independent_noise_{steps}": f"outputs, {steps} steps" for steps in summary["lengths"]}
    names |= {
        f"independent_unseen_{last}": f"outputs for unseen, {last} steps",
        f"independent_factor_{last}": f"denoising factor, {last} steps",
        f"independent_averaged_labels_{last}": "averaged labels",
        f"independent_averaged_outputs_{last}": "averaged outputs",
    }
    names |= {f"shared_noise_{steps}": f"*shared noise*: outputs, {steps} steps" for steps in summary["lengths"][-2:]}
    if setting[1] != "different":
        names[f"independent_shared_factor_{last}"] = "*shared noise*: factor"
    names |= {
        f"independent_error_{last}": f"{error}, {last} steps",
        f"independent_twin_error_{last}": f"{error} of the twin, {last} steps",
        f"shared_error_{last}": f"*shared noise*: {error}, {last} steps",
    }
    rows = [
        (title, *summary["means"][name].values(), summary["slope"].get(name, ""))
        for name, title in names.items()
        if name in summary["means"]
    ]
    first, *others = COPIES
    head = (SETTINGS[setting], f"c = {first}", *map(str, others), "slope")
    study.table(", ".join(setting), head, rows, ("", *[".3f"] * len(COPIES), ".2f"))


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Draw noise against copies, a panel for each setting."""
    reading = (
        "What is left of the noise of the labels, by the number of copies; gray: one over its square root. Lines by color: "
        "outputs after so many steps. Dotted: the denoising factor at the end. Dashed: the copies of a digit share their noise."
    )
    shape = {"columns": len(found), "size": (2.2, 1.85), "gap": (0.4, 0.0), "bottom": 0.85}
    with panels("Label noise by copies", reading, **shape) as (figure, (row,)):
        for axes, (setting, summary) in zip(row, found.items(), strict=True):
            *_, last = lengths = summary["lengths"]
            colors = dict(zip(lengths, style.CYCLE, strict=False))
            lines = {f"independent_noise_{steps}": (color, "o-", f"{steps} steps") for steps, color in colors.items()}
            lines |= {f"independent_factor_{last}": (style.INK, "s:", "factor")}
            lines |= {f"shared_noise_{last}": (colors[last], "o--", f"shared noise, {last} steps")}
            for start in (0.125, 0.25, 0.5, 1.0):
                axes.plot(COPIES, [start / math.sqrt(c) for c in COPIES], color=style.RULE, linewidth=1, zorder=0)
            for name, (color, line, label) in lines.items():
                if name in summary["means"]:
                    heights, bars = zip(*summary["means"][name].values(), strict=True)
                    axes.errorbar(COPIES, heights, yerr=bars, fmt=line, color=color, markersize=3.5, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(ylim=(0.015, 1.7), xlabel="copies")
            axes.set_xticks(COPIES, [str(copies) for copies in COPIES])
            axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
            axes.set_title(setting, fontsize=9)
        row[0].set_ylabel("noise left")
        figure.legend(*row[0].get_legend_handles_labels(), loc="lower left", ncols=5, bbox_to_anchor=(0.02, 0.0))
    return figure


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options, (digits, _) = study.options, read_mnist(study.options.data_dir)
    lengths, seeds = ("-".join(map(str, some)) for some in (options.lengths, options.seeds))
    found = {}
    for name in options.settings:
        task, kind = name.split(" ")
        log, rows = RunLog(options.out / f"{name}, {lengths} steps, seeds {seeds}.csv"), {}
        for copies in COPIES:
            make = partial(run, (task, kind), digits, options.digits, copies, options.lengths, options.seeds)
            flat = log.get({"copies": copies, "digits": options.digits}, make)
            rows[copies] = [
                {column.split(" ")[1]: value for column, value in flat.items() if column.startswith(f"{seed} ")}
                for seed in options.seeds
            ]
        found[f"{task}, {kind}"] = summarize(rows, options.lengths)
        write_table(study, (task, kind), found[f"{task}, {kind}"])
    exact = {name: float(f"{value:.2g}") for name, value in exact_law(digits, options.seeds[0]).items()}
    print(f"\nSeen as identical: outputs differ by {exact['outputs']:g}, √copies × factor by {exact['factor']:g} at most.")
    study.figure(draw(found), dpi=110)
    return {"settings": found, "exact": exact, "options": study.sizes}


if __name__ == "__main__":
    main()
