"""Do the bounds of difference alignment show in trained networks: a smaller spread of distances, a smaller generalization gap?

After Chen et al., Robust Similarity Learning with Difference Alignment Regularization, ICLR 2024. Theorem 2 bounds the spread
|d(x, x̂) − d(z, ẑ)| of distances, over max d, by a term that falls with the weight λ; Theorem 3 bounds the difference between
held-out and training loss by terms that fall with λ and with the length n of the chain. A small convolutional network learns
embeddings of scikit-learn's digits from few images with one loss or another, and both are measured against λ and n.

    python experiments/alignment_bounds.py [--quick] [--out DIRECTORY]

Beside the tables it writes a figure and every run (`runs.csv`). Runs that stand there already are not repeated: an interrupted
experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Mean, Size, Study, difference, mean_of, script, spearman
from lab.figures import panels
from lab.training import take_step
from lightning_netsim.demos import DigitsDataModule
from lightning_netsim.functional.difference_alignment import ctv_norm
from lightning_netsim.losses import ContrastiveLoss, DifferenceAlignmentLoss, MetricLearningLoss
from lightning_netsim.losses.criterion import AbstractEmbeddingLoss
from lightning_netsim.report import style

SIZES = {
    "steps": Size(300, 20, "steps of training"),
    "seeds": Size(8, 2, "networks for each setting"),
    "seed": Size(0, None, "the first seed"),
}
CLASSES, WIDTH, BATCH, LEARNING_RATE = 10, 64, 64, 1e-3
# The share of the images that is held out: few are trained on, so that there is a gap to see.
HELD_OUT = 0.8
# Batches over which a loss is averaged, the same for every network of a seed.
LOSS_BATCHES = 100
WEIGHTS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
LENGTHS = (2, 4, 8, 16, 32, 63)
# With the sum over the pairs of a chain instead of their mean, the same sum at the greatest length as the greatest weight.
SUM_WEIGHT = 0.005
LOSSES = ("N-pair", "Proxy-Anchor", "contrastive")
# What a table shows, with so many decimals.
DIGITS = {"spread_train": 4, "spread_test": 4, "max_distance": 2, "loss_train": 3, "loss_test": 3, "gap": 4}


@dataclass(frozen=True)
class Setting:
    """What a network is trained with.

    Attributes:
        loss: one of `LOSSES`.
        weight: λ; 0 for the loss alone.
        difference: what is aligned, see `DifferenceAlignmentLoss`.
        norm: G, see `DifferenceAlignmentLoss`.
        length: n, the length of the chain; None for that of the batch.
        total: whether λ weighs the sum over the n(n − 1)/2 pairs of differences, as in the paper, instead of their mean.
    """

    loss: str
    weight: float = 0.0
    difference: str = "distance"
    norm: str = "squared_l2"
    length: int | None = None
    total: bool = False

    def __str__(self) -> str:
        if self.weight == 0:
            return self.loss
        chain = f" n={self.length}" * (self.length is not None) + " sum" * self.total
        return f"{self.loss} + {self.weight:g} {self.difference} {self.norm}{chain}"

    @property
    def normalize(self) -> bool:
        """Whether embeddings are compared by direction alone; the contrastive loss compares them as they are."""
        return self.loss != "contrastive"

    def criterion(self) -> AbstractEmbeddingLoss:
        if self.loss == "N-pair":
            return MetricLearningLoss("NPairsLoss")
        if self.loss == "Proxy-Anchor":
            return MetricLearningLoss("ProxyAnchorLoss", {"num_classes": CLASSES, "embedding_size": WIDTH})
        return ContrastiveLoss()

    def factor(self) -> float:
        """Return what the mean over the pairs of differences is multiplied with."""
        length = BATCH - 1 if self.length is None else self.length
        return self.weight * (length * (length - 1) / 2 if self.total else 1.0)


ARMS = {
    "N-pair": Setting("N-pair"),
    "N-pair, G = L2": Setting("N-pair", norm="l2"),
    "N-pair, vectors": Setting("N-pair", difference="signed"),
    "Proxy-Anchor": Setting("Proxy-Anchor"),
    "contrastive": Setting("contrastive"),
}
CHAINS = {
    "N-pair": Setting("N-pair", 1.0),
    "N-pair, sum": Setting("N-pair", SUM_WEIGHT, total=True),
    "contrastive": Setting("contrastive", 1.0),
}


def make_network() -> nn.Module:
    """Return a network of two convolutions that maps digits of 8×8 pixels to embeddings: 13,056 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, WIDTH),
    )


def load(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and held-out images with labels, of the same classes."""
    train, held_out = (part.tensors for part in DigitsDataModule(val_fraction=HELD_OUT, seed=seed).load_sets())
    return (train[0], train[1]), (held_out[0], held_out[1])


def run(setting: Setting, seed: int, steps: int) -> dict[str, float]:
    """Train a network and measure it; split, initial weights and batches depend on the seed alone."""
    start = time.perf_counter()
    train, held_out = load(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, criterion = make_network(), setting.criterion()
    alignment = DifferenceAlignmentLoss(
        setting.difference, setting.norm, num_differences=setting.length, normalize=setting.normalize, seed=seed
    )
    optimizer = torch.optim.Adam([*network.parameters(), *criterion.parameters()], LEARNING_RATE)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(train[1]), generator=draws)[:BATCH]
        embeddings, labels = network(train[0][chosen]), train[1][chosen]
        loss = criterion(embeddings, labels)
        if setting.weight > 0:
            loss = loss + setting.factor() * alignment(embeddings, labels)
        take_step(optimizer, loss)
    found = measure(network, criterion, setting.normalize, train, held_out)
    return found | {"seconds": time.perf_counter() - start}


@torch.no_grad()
def measure(
    network: nn.Module,
    criterion: AbstractEmbeddingLoss,
    normalize: bool,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Return spread, loss and R@1 of both parts, the gap of the loss, and max d.

    Both spreads are divided by the greatest distance of two training images, as the theorem has it.
    """
    found = {}
    for part, (images, labels) in (("train", train), ("test", held_out)):
        embeddings = network(images)
        found[f"loss_{part}"] = mean_loss(criterion, embeddings, labels)
        compared = F.normalize(embeddings.double(), dim=1) if normalize else embeddings.double()
        distances = torch.cdist(compared, compared, compute_mode="donot_use_mm_for_euclid_dist")
        if part == "train":
            found["max_distance"] = float(distances.max())
        found[f"spread_{part}"] = spread(distances, labels) / found["max_distance"]
        nearest = distances.fill_diagonal_(math.inf).argmin(1)
        found[f"recall_{part}"] = float((labels[nearest] == labels).double().mean())
    return found | {"gap": found["loss_test"] - found["loss_train"]}


def mean_loss(criterion: AbstractEmbeddingLoss, embeddings: Tensor, labels: Tensor) -> float:
    """Return the mean of a loss over batches as large as those of training, always the same ones."""
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randperm(len(labels), generator=draws)[:BATCH] for _ in range(LOSS_BATCHES)]
    return sum(float(criterion(embeddings[batch], labels[batch])) for batch in batches) / LOSS_BATCHES


def spread(distances: Tensor, labels: Tensor) -> float:
    """Return the mean of |d(x, x̂) − d(z, ẑ)| over all pairs of pairs, each of two samples of different classes."""
    apart = (labels.unsqueeze(1) != labels).triu(diagonal=1)
    return float(ctv_norm(distances[apart].unsqueeze(1), norm="l1", reduction="mean"))


def rank_correlation(places: Sequence[float], values: Sequence[float]) -> float:
    """Return the rank correlation; 0 where all values are the same."""
    return spearman(places, values) or 0.0


def follow(study: Study, settings: dict[float, Setting]) -> dict[str, Any]:
    """Train at each place on an axis and every seed; return means, standard errors and rank correlations with the place.

    `gap_change` is the gap at a place minus that at the first one, paired by seed.
    """
    steps, first = study.options.steps, study.options.seed
    seeds, places = range(first, first + study.options.seeds), list(settings)
    runs = [
        study.log.by_seed({"setting": str(some), "steps": steps}, seeds, partial(run, some, steps=steps))
        for some in settings.values()
    ]
    found: dict[str, Any] = {"places": places}
    for name in runs[0][0]:
        means = [round(mean_of(rows, name), 5) for rows in runs]
        found[name], found[f"{name}_se"] = [mean.mean for mean in means], [mean.error for mean in means]
        found[f"{name}_rho"] = round(rank_correlation(places, found[name]), 3)
        by_seed = [rank_correlation(places, [row[name] for row in rows]) for rows in zip(*runs, strict=True)]
        found[f"{name}_rho_by_seed"] = round(mean_of(by_seed), 3)
    found["gap_change"] = [round(difference(rows, runs[0], "gap"), 5) for rows in runs]
    return found


def write_table(study: Study, name: str, axis: str, found: dict[str, Any]) -> None:
    titles = ("spread/max d, training", "held-out", "max d", "loss, training", "held-out", "gap", "change of the gap", "R@1, %")
    means = {
        key: [Mean(*pair) for pair in zip(found[key], found[f"{key}_se"], strict=True)] for key in (*DIGITS, "recall_test")
    }
    rows: list[list[object]] = [
        [
            f"{place:g}",
            *(f"{means[key][row]:.{digits}f}" for key, digits in DIGITS.items()),
            found["gap_change"][row] if row else "",
            100 * means["recall_test"][row],
        ]
        for row, place in enumerate(found["places"])
    ]
    keys = ("spread_train", "spread_test", "gap")
    rho = [f"{found[f'{key}_rho']:+.2f} ({found[f'{key}_rho_by_seed']:+.2f})" for key in keys]
    rows.append(["ρ", *rho[:2], "", "", "", rho[2], "", ""])
    study.table(f"{name}, against {axis}", (axis, *titles), rows, [*[""] * 7, "+.4f", ".1f"], f"{name}, against {axis}", left=0)


def plot(by_weight: dict[str, Any], by_length: dict[str, Any], seeds: int) -> Figure:
    """Draw spread and gap against λ, and the gap against the length of the chain."""
    reading = (
        f"Mean and standard error of {seeds} seeds. Left: mean |d(x, x̂) − d(z, ẑ)| of pairs of different classes over max d, "
        "held-out images (training images dashed). Middle and right: held-out minus training loss, each over that at the "
        "left end of its axis; the losses differ in kind and scale."
    )
    title = "Difference alignment: spread of distances and generalization gap"
    colors = dict(zip(dict.fromkeys([*by_weight, *by_length]), style.CYCLE, strict=False))
    with panels(title, reading, columns=3, size=(2.85, 2.4)) as (figure, ((left, middle, right),)):
        for name, found in by_weight.items():
            places = [place or min(found["places"][1:]) / 5 for place in found["places"]]
            draw_series(left, places, found, "spread_test", colors[name], name)
            left.plot(places, found["spread_train"], color=colors[name], linestyle="--", linewidth=0.9)
            draw_series(middle, places, found, "gap", colors[name], name, found["gap"][0])
        for name, found in by_length.items():
            draw_series(right, found["places"], found, "gap", colors[name], name, found["gap"][0])
        for axes, label, quantity in (
            (left, "λ (leftmost: 0)", "spread / max d"),
            (middle, "λ (leftmost: 0)", "gap, relative"),
            (right, "length of the chain", "gap, relative"),
        ):
            axes.set(xscale="log", xlabel=label, ylabel=quantity)
            axes.minorticks_off()
        lengths = next(iter(by_length.values()))["places"]
        right.set_xticks(lengths, [f"{length:g}" for length in lengths])
        left.legend(fontsize=7)
        right.legend(fontsize=7)
    return figure


def draw_series(
    axes: Axes, places: Sequence[float], found: dict[str, Any], key: str, color: str, name: str, unit: float = 1
) -> None:
    values, errors = ([value / unit for value in found[some]] for some in (key, f"{key}_se"))
    axes.errorbar(places, values, yerr=errors, color=color, marker="o", markersize=3, label=name)


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    quick = study.options.quick
    weights, lengths = (WEIGHTS[::3], LENGTHS[::2]) if quick else (WEIGHTS, LENGTHS)
    names = ("N-pair", "contrastive") if quick else (*ARMS, *CHAINS)
    by_weight, by_length = {}, {}
    for name in (name for name in ARMS if name in names):
        by_weight[name] = follow(study, {weight: replace(ARMS[name], weight=weight) for weight in weights})
        write_table(study, name, "λ", by_weight[name])
    for name in (name for name in CHAINS if name in names):
        by_length[name] = follow(study, {float(length): replace(CHAINS[name], length=length) for length in lengths})
        write_table(study, name, "n", by_length[name])
    study.figure(plot(by_weight, by_length, study.options.seeds))
    return {
        "weights": list(weights),
        "lengths": list(lengths),
        "spread_train": by_weight["N-pair"]["spread_train"],
        "spread_test": by_weight["N-pair"]["spread_test"],
        "spread_rho": {name: found["spread_test_rho"] for name, found in by_weight.items()},
        "gap_lambda_rho": {name: found["gap_rho"] for name, found in by_weight.items()},
        "gap_chain_rho": {name: found["gap_rho"] for name, found in by_length.items()},
        "by_weight": by_weight,
        "by_length": by_length,
        "options": study.sizes,
    }


if __name__ == "__main__":
    main()
