"""Ask a network, while it learns, to treat images of one class as the same: does it learn faster in its first steps?

After Charpiat et al., NeurIPS 2019, section 5 and figure 3 of the supplementary material: accuracy on MNIST against the number
of mini-batches, with and without a similarity criterion beside the cross-entropy. Each step presents 2·n_B images of one class,
drawn at random, to every variant alike; the variants of one seed start from the same weights and see the same images.

    python experiments/mnist_dynamics.py [--quick] [--networks paper tanh] [--seeds 24 15] [--out DIRECTORY]
    python experiments/mnist_dynamics.py --choose-weights

Beside the tables it writes a figure and every run (`runs.csv`, `choice.csv`). Runs that stand there already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import RunLog, Size, Study, script
from lab.data import Labeled, read_mnist
from lab.figures import panels
from lab.training import accuracy, take_step
from lightning_netsim import JacobianOperator
from lightning_netsim.demos import MNISTNetwork
from lightning_netsim.losses import GradientBatch, GroupSimilarityLoss, MinibatchSimilarityLoss, PairSimilarityLoss
from lightning_netsim.report import style

STEPS = (10, 20, 30, 50, 100)
# Read off figure 3 of the paper, ± 0.5.
PAPER = {
    "baseline": {"10": 18.8, "20": 26.0, "30": 38.3, "50": 53.6, "100": 71.6},
    "with similarity": {"10": 27.2, "20": 36.4, "30": 48.1, "50": 60.2, "100": 72.7},
}
# By n_B. Chosen by --choose-weights: the highest accuracy on validation images, averaged over steps 10, 20, 30 and 50. But
# "released" has the weight √n_B of the released code, and "cosine" the same, so that nothing but their sign differs.
WEIGHTS = {
    1: {"pair": 0.1, "minibatch": 0.03, "cosine": 1.0, "released": 1.0},
    16: {"minibatch": 0.03, "cosine": 4.0, "released": 4.0, "ours": 0.1, "ours_opposite": 4.0},
}
# The factor n_B makes the paper's criterion for mini-batches larger than the others.
TRIED_WEIGHTS = dict.fromkeys(("pair", "cosine", "ours"), (0.1, 0.3, 1.0, 4.0)) | {"minibatch": (0.03, 0.1, 0.3, 1.0)}
TRIED_WEIGHTS |= dict.fromkeys(("released", "ours_opposite"), (0.1, 0.3, 1.0, 4.0, 16.0))
# What the networks other than the paper's are trained with beside the baseline: enough to tell the two signs apart.
OTHER_VARIANTS = ("cosine", "released")
CHOICE_STEPS = (10, 20, 30, 50)
# Of the training images, the last ones serve the choice of weights and are never trained on.
VALIDATION_IMAGES = 10_000
# Of all training images, as in the released code.
PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081
COLORS = dict(zip(("ours", "released", "pair", "cosine", "minibatch", "ours_opposite"), style.CYCLE, strict=False))
COLORS |= {"baseline": style.INK, "mixed": style.MUTED}


class Run(NamedTuple):
    """What is trained: all that its accuracies depend on, beside the images.

    A step takes 2·n_B images, n_B being `batch_size`. The variant is one of `CRITERIA`, which has a weight; "baseline", that is
    cross-entropy alone; or "mixed", the baseline on images of all classes. The seed gives initial weights and batches.
    """

    network: str
    batch_size: int
    variant: str
    weight: float
    seed: int
    last_step: int
    test_images: int


class Residual(nn.Module):
    """Add to x what two convolutions make of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.between, self.after = nn.PReLU(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.after(x + self.second(self.between(self.first(x))))
        return changed


def residual_network() -> nn.Module:
    """Return a network of two residual blocks."""
    stem, widen = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    first = (stem, nn.PReLU(), nn.AvgPool2d(2), Residual(16))
    second = (nn.AvgPool2d(2), widen, nn.PReLU(), Residual(32), nn.AvgPool2d(2))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(288, 10))


def deep_network() -> nn.Module:
    """Return a network of eight convolutions, with the initial weights of He: by PyTorch's own its signal fades away."""
    widths, layers = (1, 16, 16, 16, 32, 32, 32, 32, 32), []
    for layer in range(8):
        convolution = nn.Conv2d(widths[layer], widths[layer + 1], 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, a=0.25)  # The slope with which a PReLU starts.
        layers += [convolution, nn.PReLU(), *([nn.AvgPool2d(2)] if layer in (0, 2, 5) else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 10))


def tanh_network() -> nn.Module:
    """Return the network of the paper with tanh in place of each PReLU."""
    return nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.PReLU) else layer for layer in MNISTNetwork()))


NETWORKS = {"paper": MNISTNetwork, "residual": residual_network, "deep": deep_network, "tanh": tanh_network}
SIZES = {
    "networks": Size(tuple(NETWORKS), ("paper",), "which", choices=tuple(NETWORKS)),
    "batch_sizes": Size((1, 16), None, "n_B; each step takes 2·n_B images"),
    "seeds": Size((24, 15), (2,), "number of seeds of the paper's network, for each n_B"),
    "other_seeds": Size((10,), (2,), "of each other network, for each n_B"),
    "seed": Size(0, None, "the first seed, of initial weights and batches"),
    "steps": Size(STEPS, (10, 20), "after which accuracy is measured"),
    "test_images": Size(1000, None, "to measure accuracy on, the same for all runs"),
    "choose_weights": Size(False, None, "try weights, on validation images, with three other seeds"),
}


def make_network(name: str, seed: int) -> nn.Module:
    """Return a network with the initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


def pair_criterion(batch: GradientBatch) -> Tensor:
    """Return −mean k^C of the n_B pairs made of one image of each half: the paper's criterion for two samples."""
    pairs = torch.arange(len(batch.outputs) // 2).repeat(2)
    return PairSimilarityLoss()(GradientBatch(batch.operator, batch.inputs, pairs, lambda: batch.all_gradients))


def cosine_criterion(batch: GradientBatch) -> Tensor:
    """Return −cos(μ₁, μ₂) of the mean gradients of both halves; the released code of the paper *adds* the cosine."""
    return -F.cosine_similarity(*mean_gradients(batch), dim=0)


def mean_gradients(batch: GradientBatch) -> list[Tensor]:
    """Return the mean of the gradients as they are, shape (P,), of each half of a batch."""
    size = len(batch.outputs) // 2
    share = batch.outputs.new_full((size, 1, 1), 1 / size)
    halves = (batch.all_gradients.select(half) for half in (slice(0, size), slice(size, None)))
    return [torch.cat([value.flatten() for value in half.weighted_sum(share).values()]) for half in halves]


# What is added to the cross-entropy, times this sign and a weight.
CRITERIA: dict[str, tuple[int, Callable[[GradientBatch], Tensor]]] = {
    "pair": (1, pair_criterion),
    "minibatch": (1, MinibatchSimilarityLoss()),
    "cosine": (1, cosine_criterion),
    "released": (-1, cosine_criterion),
    "ours": (1, GroupSimilarityLoss()),
    "ours_opposite": (-1, GroupSimilarityLoss()),
}


def batch_loss(operator: JacobianOperator, images: Tensor, labels: Tensor, variant: str, weight: float) -> Tensor:
    """Return the cross-entropy of a batch plus the weighted criterion of the variant, if any, from one forward pass."""
    if variant not in CRITERIA:
        return F.cross_entropy(operator.model(images), labels)
    sign, criterion = CRITERIA[variant]
    batch = GradientBatch(operator, images, labels)
    return F.cross_entropy(batch.outputs, labels) + sign * weight * criterion(batch)


def draw_batches(labels: Tensor, images_per_step: int, steps: int, seed: int, mixed: bool = False) -> Iterator[Tensor]:
    """Yield the indices of the images of each step, drawn with repetition: of one random class, or `mixed`, of all."""
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero().squeeze(1) for label in range(10)]
    for _ in range(steps):
        of_class = members[int(torch.randint(10, (), generator=generator))]
        pool = torch.arange(len(labels)) if mixed else of_class
        yield pool[torch.randint(len(pool), (images_per_step,), generator=generator)]


def train(run: Run, images: Labeled, held_out: Labeled, steps: Sequence[int]) -> list[float]:
    """Train one network by Adam at 1e-3 and return its accuracies on `held_out` after each of `steps`, in percent."""
    model = make_network(run.network, run.seed)
    operator = JacobianOperator(model, directions="contrast", create_graph=True)
    optimizer, found = torch.optim.Adam(model.parameters(), lr=1e-3), []
    batches = draw_batches(images[1], 2 * run.batch_size, run.last_step, run.seed, mixed=run.variant == "mixed")
    for step, index in enumerate(batches, start=1):
        take_step(optimizer, batch_loss(operator, images[0][index], images[1][index], run.variant, run.weight))
        if step in steps:
            found.append(100 * accuracy(model, *held_out))
    return found


def load_images(data_dir: str, validation: bool, number: int) -> tuple[Labeled, Labeled]:
    """Return the images to train on, without the validation images, and `number` test or validation images, always the same."""
    training, test = read_mnist(data_dir)
    first = len(training[1]) - VALIDATION_IMAGES
    images, labels = (tensor[first:] for tensor in training) if validation else test
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:number]
    parts = (training[0][:first], training[1][:first]), (images[chosen], labels[chosen])
    return tuple(((pixels - PIXEL_MEAN) / PIXEL_DEVIATION, some) for pixels, some in parts)  # type: ignore[return-value]


def list_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Yield all networks to be trained."""
    for network, (place, size) in itertools.product(options.networks, enumerate(options.batch_sizes)):
        variants = {name: (weight,) for name, weight in variants_of(network, size).items()}
        tried = {"baseline": (0.0,)} | (TRIED_WEIGHTS if options.choose_weights else variants)
        numbers = options.seeds if network == "paper" else options.other_seeds
        for seed in range(options.seed, options.seed + numbers[min(place, len(numbers) - 1)]):
            for variant, weight in ((name, weight) for name, some in tried.items() for weight in some):
                yield Run(network, size, variant, weight, seed, options.steps[-1], options.test_images)


def variants_of(network: str, batch_size: int) -> dict[str, float]:
    """Return what a network is trained with beside the baseline, and the weights."""
    weights = WEIGHTS[1 if batch_size == 1 else 16]
    return {"mixed": 0.0} | weights if network == "paper" else {name: weights[name] for name in OTHER_VARIANTS}


def run_all(study: Study) -> pd.DataFrame:
    """Train all networks and return their accuracies, one row each."""
    options, rows = study.options, []
    images, held_out = load_images(options.data_dir, options.choose_weights, options.test_images)
    log = RunLog(options.out / "choice.csv") if options.choose_weights else study.log

    def measured(run: Run) -> dict[str, Any]:
        start = time.perf_counter()
        accuracies = train(run, images, held_out, options.steps)
        named = {f"step_{step}": value for step, value in zip(options.steps, accuracies, strict=True)}
        return {"accuracy": named, "seconds": round(time.perf_counter() - start, 2)}

    for run in list_runs(options):
        found = log.get(run._asdict() | {"steps": options.steps}, partial(measured, run))
        rows.append(run._asdict() | found["accuracy"])
    return pd.DataFrame(rows)


def summarize(table: pd.DataFrame, steps: Sequence[int]) -> dict[str, Any]:
    """Return, by network, n_B, variant and step, accuracies and their differences from the baseline of the same seed."""
    found: dict[str, Any] = {"seeds": {}, "accuracy": {}, "difference": {}}
    early = [f"step_{step}" for step in CHOICE_STEPS if step in steps]
    for (network, size), group in table.groupby(["network", "batch_size"], sort=False):
        seeds, accuracy, difference = (part.setdefault(network, {}) for part in found.values())
        accuracy[str(size)], difference[str(size)] = {}, {}
        seeds[str(size)] = group["seed"].nunique()
        group = group.assign(early=group[early].mean(axis=1)).set_index("seed")
        columns = {f"step_{step}": str(step) for step in steps} | {"early": "early"}
        parts = {variant: rows[list(columns)].rename(columns=columns) for variant, rows in group.groupby("variant", sort=False)}
        for variant, values in parts.items():
            accuracy[str(size)][variant] = {name: spread(values[name]) for name in values}
            if variant != "baseline":
                change = values - parts["baseline"]
                difference[str(size)][variant] = {name: compared(change[name]) for name in values}
    return found


def spread(values: pd.Series) -> dict[str, float]:
    """Return mean, standard deviation and standard error over the seeds; a single seed has no deviation, 0."""
    deviation = float(np.nan_to_num(values.std()))
    return {"mean": round(float(values.mean()), 2), "sd": round(deviation, 2), "se": round(deviation / len(values) ** 0.5, 2)}


def compared(differences: pd.Series) -> dict[str, float | int | None]:
    """Return mean and standard error of paired differences, their ratio t, and of how many seeds they are above zero."""
    mean, _, error = spread(differences).values()
    return {"mean": mean, "se": error, "t": round(mean / error, 1) if error else None, "wins": int((differences > 0).sum())}


def write_tables(study: Study, figures: dict[str, Any]) -> None:
    """Write accuracies and differences of the paper's network, beside its own, and those of all others together."""
    steps, others = [str(step) for step in study.options.steps], []
    for network, by_size in figures["accuracy"].items():
        for size, variants in by_size.items():
            changes, seeds = figures["difference"][network][size], figures["seeds"][network][size]
            if network == "paper":
                write_paper_tables(study, size, steps, variants, changes)
                continue
            means = [f"{variants['baseline'][name]['mean']:.1f}" for name in [*steps, "early"]]
            others.append([f"{network}, {size} ({seeds})", "baseline, accuracy in %", *means, ""])
            for variant, row in changes.items():
                others.append(["", f"{variant}, minus baseline", *(f"{changed(row[name])}" for name in [*steps, "early"])])
                others[-1].append(row["early"]["t"])
    if others:
        head = ("network, n_B (seeds)", "variant", *steps, "early", "t of early")
        study.table("other networks", head, others, [*[""] * (len(steps) + 3), ".1f"], left=2)
    print(f"\nearly: mean over steps {CHOICE_STEPS}; t: mean difference over its standard error.")


def write_paper_tables(study: Study, size: str, steps: list[str], variants: dict[str, Any], changes: dict[str, Any]) -> None:
    weights = variants_of("paper", int(size))
    rows = [
        [
            name,
            f"{weights[name]:g}" if weights.get(name) else "",
            *(f"{row[step]['mean']:.1f} ± {row[step]['sd']:.1f}" for step in steps),
        ]
        for name, row in variants.items()
    ]
    rows += [[f"*{name}, read off the paper*", "", *(f"*{values[step]}*" for step in steps)] for name, values in PAPER.items()]
    study.table(f"accuracy, n_B = {size}", ("step", "weight", *steps), rows)
    rows = [
        [name, *(f"{changed(row[step])} ({row[step]['wins']})" for step in [*steps, "early"]), row["early"]["t"]]
        for name, row in changes.items()
    ]
    gains = {step: PAPER["with similarity"][step] - PAPER["baseline"][step] for step in PAPER["baseline"]}
    early = np.mean([gains[str(step)] for step in CHOICE_STEPS])
    rows.append(["*paper*", *(f"*{gain:+.1f}*" for gain in [*(gains[step] for step in steps), early]), ""])
    head = ("step", *steps, "early", "t of early")
    study.table(f"difference, n_B = {size}", head, rows, [*[""] * (len(steps) + 2), ".1f"])


def changed(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:+.1f} ± {cell['se']:.1f}"


def rank_weights(table: pd.DataFrame) -> dict[str, Any]:
    """Return, by n_B, variant and weight, the validation accuracy averaged over the early steps, and print it."""
    scores = table.assign(score=table[[f"step_{step}" for step in CHOICE_STEPS]].mean(axis=1))
    ranking: dict[str, Any] = {}
    for (size, variant, weight), group in scores.groupby(["batch_size", "variant", "weight"], sort=False):
        ranking.setdefault(str(size), {}).setdefault(variant, {})[f"{weight:g}"] = round(float(group["score"].mean()), 2)
        print(f"n_B = {size}, {variant} {weight:g}: early validation accuracy {group['score'].mean():.1f} %")
    return ranking


def plot_curves(figures: dict[str, Any]) -> Figure:
    """Draw the accuracies against the number of steps, one panel for each n_B (rows) and network (columns)."""
    networks, sizes = list(figures["accuracy"]), list(next(iter(figures["accuracy"].values())))
    title = "First steps on MNIST, with and without a similarity criterion"
    reading = (
        "Each step presents 2·n_B images of one class (mixed: of all classes). Lines: mean over the seeds; bands: ± one "
        "standard error. Crosses: read off the paper (black: its baseline; orange: with similarity). With n_B = 1, cosine "
        "and ours are pair with another weight."
    )
    lines: dict[str, Any] = {}
    shape = {"rows": len(sizes), "columns": len(networks), "size": (2.2, 2.0), "gap": (0.4, 0.75), "margin": (0.6, 1.5)}
    with panels(title, reading, **shape) as (figure, grid):
        for (row, size), (column, network) in itertools.product(enumerate(sizes), enumerate(networks)):
            axes = grid[row][column]
            axes.set(xlim=(0, STEPS[-1]), ylim=(0, 100), xlabel="steps", ylabel="accuracy (%)" if column == 0 else "")
            axes.set_title(f"{network}, n_B = {size}, {figures['seeds'][network][size]} seeds", fontsize=9.5, loc="left")
            lines |= draw_curves(axes, figures["accuracy"][network][size])
            for name, values in PAPER.items() if network == "paper" else ():
                color = COLORS.get(name, COLORS["released"])
                axes.scatter([int(step) for step in values], list(values.values()), marker="x", color=color, s=30, zorder=3)
        figure.legend(lines.values(), lines, loc="upper right", bbox_to_anchor=(1, 1 - 1.1 / figure.get_figheight()))
    return figure


def draw_curves(axes: Axes, variants: dict[str, Any]) -> dict[str, Any]:
    """Draw the curves of one panel and return their lines by variant."""
    lines = {}
    for variant, row in variants.items():
        cells = {int(name): cell for name, cell in row.items() if name != "early"}
        mean, error = (np.array([cell[key] for cell in cells.values()]) for key in ("mean", "se"))
        color, dashes = COLORS[variant], "--" if variant == "mixed" else "-"
        (lines[variant],) = axes.plot(list(cells), mean, dashes, color=color, linewidth=1.3)
        axes.fill_between(list(cells), mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    return lines


@script(SIZES, threads=2)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    if options.choose_weights:
        others = {"networks": ["paper"], "steps": CHOICE_STEPS, "seed": options.seed or 1000}
        vars(options).update(others | ({} if len(options.seeds) == 1 else {"seeds": [3]}))
        figures: dict[str, Any] = {"validation_accuracy": rank_weights(run_all(study))}
    else:
        figures = summarize(run_all(study), options.steps)
        write_tables(study, figures)
        study.figure(plot_curves(figures), dpi=95)
        figures["weights"] = {str(size): variants_of("paper", size) for size in options.batch_sizes}
    return figures | {"settings": study.sizes, "seconds": study.seconds}


if __name__ == "__main__":
    main()
