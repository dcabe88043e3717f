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

Prints a table, writes a figure and every run (a CSV for each setting), and prints as its last line one JSON object. Runs that
stand in these files already are not repeated.
"""

from __future__ import annotations

import argparse
import json
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

from experiments.noisy_targets import CLASSES, Kernel, load_digits, loss_of, seeded, train_together
from experiments.run_log import RunLog, mean_and_error
from lightning_netsim.report import style

COPIES = (1, 2, 4, 8, 16)
SETTINGS = (("values", "identical"), ("values", "moved"), ("values", "different"), ("classes", "moved"))
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
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


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
    def make(cls, task: str, kind: str, digits: tuple[Tensor, Tensor], number: int, copies: int, seed: int) -> Copies:
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
    digits: tuple[Tensor, Tensor],
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


def exact_law(digits: tuple[Tensor, Tensor], seed: int, number: int = 20, steps: int = 50) -> dict[str, float]:
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
                optimizer.zero_grad()
                loss_of(network(inputs), targets).backward()
                optimizer.step()
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
    means: dict[str, dict[str, list[float]]] = {}
    slopes = {}
    for name in rows[max(rows)][0]:
        values = {copies: [row[name] for row in some] for copies, some in rows.items()}
        means[name] = {str(copies): [round(value, 5) for value in mean_and_error(some)] for copies, some in values.items()}
        if name.rsplit("_", 1)[0].endswith(("noise", "unseen", "factor", "averaged_labels", "averaged_outputs")):
            fits = [slope(list(values), some) for some in zip(*values.values(), strict=True)]
            slopes[name] = [round(value, 4) for value in mean_and_error(fits)]
    return {"means": means, "slope": slopes, "lengths": list(lengths)}


def print_tables(found: dict[str, dict[str, Any]]) -> None:
    for setting, summary in found.items():
        print(f"\n{setting}\n| after steps | noise left | {' | '.join(f'c = {c}' for c in COPIES)} | slope |")
        print(f"|---:|---|{'---:|' * (len(COPIES) + 1)}")
        rows = {
            "independent_noise": "in the outputs",
            "independent_unseen": "in the outputs, unseen",
            "independent_factor": "denoising factor",
            "independent_positive_factor": "the same, clamped",
            "independent_averaged_outputs": "in averaged outputs",
            "shared_noise": "shared: in the outputs",
            "independent_shared_factor": "shared: factor",
        }
        for steps in summary["lengths"]:
            for name, title in rows.items():
                if (key := f"{name}_{steps}") in summary["means"]:
                    cells = ["{:.3f} ± {:.3f}".format(*summary["means"][key][str(copies)]) for copies in COPIES]
                    print(f"| {steps} | {title} | {' | '.join(cells)} | {{:.2f}} ± {{:.2f}} |".format(*summary["slope"][key]))


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Draw noise against copies, a panel for each setting."""
    reading = (
        "What is left of the noise of the labels, by the number of copies; gray: one over its square root. Lines by color: "
        "outputs after so many steps. Dotted: the denoising factor at the end. Dashed: the copies of a digit share their noise."
    )
    width = 0.9 + 2.6 * len(found)
    with style.styled():
        figure = style.new_figure(width, 3.9, "Label noise by copies", reading)
        for column, (setting, summary) in enumerate(found.items()):
            axes = style.add_axes(figure, 0.7 + 2.6 * column, 0.9, width - 2.9 - 2.6 * column, 1.15)
            lengths = summary["lengths"]
            lines = {
                f"independent_noise_{steps}": (style.CYCLE[place], "o-", f"{steps} steps")
                for place, steps in enumerate(lengths)
            }
            last = style.CYCLE[len(lengths) - 1]
            lines |= {f"independent_factor_{lengths[-1]}": (style.INK, "s:", "factor")}
            lines |= {f"shared_noise_{lengths[-1]}": (last, "o--", f"shared noise, {lengths[-1]} steps")}
            for start in (0.125, 0.25, 0.5, 1.0):
                axes.plot(COPIES, [start / math.sqrt(c) for c in COPIES], color=style.RULE, linewidth=1, zorder=0)
            for name, (color, line, label) in lines.items():
                if name in summary["means"]:
                    heights, bars = zip(*(summary["means"][name][str(copies)] for copies in COPIES), strict=True)
                    axes.errorbar(COPIES, heights, yerr=bars, fmt=line, color=color, markersize=3.5, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylim(0.015, 1.7)
            axes.set_xticks(COPIES, [str(copies) for copies in COPIES])
            axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
            axes.set_title(setting, fontsize=9)
            axes.set_xlabel("copies")
            if column == 0:
                axes.set_ylabel("noise left")
                figure.legend(*axes.get_legend_handles_labels(), loc="lower left", ncols=5, bbox_to_anchor=(0.02, 0.0))
    return figure


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True, help="directory with MNIST/raw in it")
    parser.add_argument("--quick", action="store_true", help="few digits and steps, one seed: only to see that it works")
    names = [" ".join(setting) for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="what is learned, and from which copies")
    parser.add_argument("--digits", type=int, help="digits, each of which is copied (100)")
    parser.add_argument("--lengths", type=int, nargs="+", help="steps of the trainings (100 300 900)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of digits, noise and networks (100 to 104)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/augmentation_denoises"), help="directory of log and figure")
    options = parser.parse_args(arguments)
    full = {"digits": 100, "lengths": [100, 300, 900], "seeds": list(range(100, 105))}
    quick = {"digits": 20, "lengths": [10, 50], "seeds": [100]}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    digits = load_digits(options.data_dir)
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
    print_tables(found)
    exact = {name: float(f"{value:.2g}") for name, value in exact_law(digits, options.seeds[0]).items()}
    print(f"\nSeen as identical: outputs differ by {exact['outputs']:g}, √copies × factor by {exact['factor']:g} at most.")
    style.save_figure(draw(found), options.out / "augmentation_denoises.png", dpi=110)
    print(f"The figure and all runs are in {options.out}/")
    names = ("digits", "lengths", "seeds")
    figures = {"settings": found, "exact": exact, "options": {name: getattr(options, name) for name in names}}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
