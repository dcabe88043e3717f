"""Learn features of digits without labels: does it help SimCLR to align the differences of its embeddings?

After the self-supervised experiments of Chen et al., Robust Similarity Learning with Difference Alignment Regularization, ICLR
2024, at a size that one core can train: a small convolutional network on 6,000 MNIST images, two random affine views of each.
Alignment is "cluster-free" (each image is a class of its own) or "cluster-used" (clusters of the last epoch are the classes).
Temperature and λ are chosen on training images that are held out; fresh seeds are then judged on test images, by what nearest
neighbors, a linear probe and k-means find in the features before the projection head.

    python experiments/simclr.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Beside the tables it writes a figure and every run (`runs.csv`). Runs that stand there already are not repeated: an interrupted
experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Mean, RunLog, Size, Study, difference, mean_of, script
from lab.affine import draw_maps, transform
from lab.data import Labeled, read_mnist
from lab.figures import panels
from lab.training import take_step
from lightning_netsim.estimators import EmbeddingMetrics, LinearProbe, PseudoLabels
from lightning_netsim.losses import DifferenceAlignmentLoss, MetricLearningLoss
from lightning_netsim.report import style

SIZES = {
    "images": Size(6000, 512, "training images"),
    "epochs": Size(10, 2, "epochs of training"),
    "batch_size": Size(128, 64, "images in a batch, of each of which there are two views"),
    "seeds": Size(8, 2, "networks for each arm"),
    "search_seeds": Size(2, 1, "networks for each setting that is tried"),
    "seed": Size(0, None, "the first seed; those of the search follow 1,000 later"),
}
# The last training images are the validation split; those that a network learns from are drawn among the others.
POOL = 50_000
LEARNING_RATE = 3e-3
HIDDEN, PROJECTED = 128, 64
CLUSTERS = 10
# Images whose distances are all compared.
COMPARED = 2000
TEMPERATURES = (0.1, 0.2, 0.5)
WEIGHTS = (0.1, 1.0, 10.0, 100.0)
ALIGNED = ("cluster-free", "cluster-used")
# What features are judged by, and the unit of tables.
FIGURES = {"knn": 100, "probe": 100, "nmi": 1}
JUDGES = {"knn": "k-NN", "probe": "linear probe"}


@dataclass(frozen=True)
class Setting:
    """How a network is trained: "SimCLR" alone, or with alignment of one kind or the other and its weight λ."""

    mode: str = "SimCLR"
    weight: float = 0.0
    temperature: float = 0.5

    def __str__(self) -> str:
        aligned = f" + {self.weight:g} {self.mode}" if self.mode in ALIGNED else ""
        return f"SimCLR T={self.temperature:g}{aligned}"


@dataclass(frozen=True)
class Data:
    """All of the images: those to draw from, and those that features are judged on."""

    pool: Labeled
    judged: dict[str, Labeled]

    @classmethod
    def load(cls, data_dir: str, validation: int, test: int) -> Data:
        """Load MNIST, with so many images of the validation split and of the test images."""
        (images, labels), held_out = read_mnist(data_dir)
        judged = {
            "validation": (images[POOL:][:validation], labels[POOL:][:validation]),
            "test": (held_out[0][:test], held_out[1][:test]),
        }
        return cls((images[:POOL], labels[:POOL]), judged)

    def draw(self, seed: int, count: int) -> Labeled:
        """Return the images that the network of a seed learns from; their labels serve the judgment alone."""
        chosen = torch.randperm(len(self.pool[1]), generator=torch.Generator().manual_seed(seed))[:count]
        return self.pool[0][chosen], self.pool[1][chosen]


class Encoder(nn.Module):
    """Three convolutions with stride 2 give the features, 1,024 numbers; two linear layers project them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3)):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.projection = nn.Sequential(nn.Linear(1024, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PROJECTED))

    def forward(self, images: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.features(images))
        return projected


def train(setting: Setting, images: Tensor, seed: int, epochs: int, batch_size: int) -> Encoder:
    """Train an encoder; initial weights, batches and views depend on the seed alone, not on the setting."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder()
    # With labels that two views share, this is NT-Xent, number by number, without its table of all triples of samples:
    # at 512 views, 0.01 s instead of 7 s.
    contrast = MetricLearningLoss("SupConLoss", {"temperature": setting.temperature})
    alignment = DifferenceAlignmentLoss(seed=seed)
    clusters = PseudoLabels(CLUSTERS, seed)
    optimizer = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
    draws = torch.Generator().manual_seed(seed)
    instances = torch.arange(batch_size)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=draws)
        for start in range(0, len(images) - batch_size + 1, batch_size):
            batch = images[order[start : start + batch_size]]
            views = torch.cat([transform(batch, draw_maps(batch_size, draws)) for _ in range(2)])
            projected = encoder(views)
            loss = contrast(projected, instances.repeat(2))
            if setting.mode in ALIGNED:
                used = setting.mode == "cluster-used"
                labels = clusters.assign(projected[:batch_size]) if used else instances
                loss = loss + setting.weight * alignment(projected, labels.repeat(2))
                clusters.update(projected)
            take_step(optimizer, loss)
        if setting.mode == "cluster-used":
            clusters.refresh()
    return encoder


@torch.no_grad()
def judge(encode: nn.Module, learned: Labeled, judged: Labeled) -> dict[str, float]:
    """Return k-NN and probe accuracy with the images learned from as reference, and NMI of the judged ones."""
    metrics, probe = EmbeddingMetrics(recall_at=(1,), map_at_r=False), LinearProbe()
    for (images, labels), reference in ((learned, True), (judged, False)):
        features = torch.cat([encode(part) for part in images.split(1000)])
        metrics.update(features, labels, reference=reference)
        probe.update(features, labels, reference=reference)
    found = metrics.compute()
    return {"knn": float(found["knn_accuracy"]), "probe": float(probe.compute()), "nmi": float(found["nmi"])}


@torch.no_grad()
def distances(encoder: Encoder, judged: Labeled) -> dict[str, float]:
    """Return mean and standard deviation of the distances of projections of different images, of one digit and of two."""
    images, labels = (part[:COMPARED] for part in judged)
    projected = F.normalize(encoder(images).double(), dim=1)
    between = torch.cdist(projected, projected)
    same = labels.unsqueeze(1) == labels
    upper = torch.ones_like(same).triu(diagonal=1)
    found = {}
    for name, chosen in (("one_digit", between[same & upper]), ("two_digits", between[~same & upper])):
        found |= {f"distance_{name}": float(chosen.mean()), f"deviation_{name}": float(chosen.std())}
    return found


def run(study: Study, data: Data, setting: Setting, part: str, seed: int) -> dict[str, float]:
    """Train a network and judge it on images of "validation" or "test"."""
    start, options = time.perf_counter(), study.options
    learned, judged = data.draw(seed, options.images), data.judged[part]
    encoder = train(setting, learned[0], seed, options.epochs, options.batch_size).eval()
    trained = time.perf_counter() - start
    return judge(encoder.features, learned, judged) | distances(encoder, judged) | {"seconds": trained}


def reference(study: Study, data: Data, name: str, seed: int) -> dict[str, float]:
    """Judge pixels, or the features of a network that is not trained, on the test images."""
    learned = data.draw(seed, study.options.images)
    untrained = train(Setting(), learned[0], seed, 0, study.options.batch_size).features.eval()
    return judge(untrained if name == "not trained" else nn.Flatten(), learned, data.judged["test"])


def worth(rows: Sequence[dict[str, float]]) -> float:
    """Return what settings are chosen by: the mean of k-NN and probe accuracy, over all seeds."""
    return sum(row["knn"] + row["probe"] for row in rows) / (2 * len(rows))


Of = Callable[[Setting, str, Sequence[int]], list[dict[str, float]]]
"""(setting, "validation" or "test", seeds) -> what the networks of all seeds are worth."""


def choose(
    of: Of, seeds: Sequence[int], temperatures: Sequence[float], weights: Sequence[float]
) -> tuple[dict[str, Setting], dict[str, list[dict[str, float]]]]:
    """Choose the temperature of SimCLR alone, then λ of each kind of alignment, on the validation split."""
    tried: dict[str, list[dict[str, float]]] = {}

    def best(settings: list[Setting]) -> Setting:
        tried.update({str(setting): of(setting, "validation", seeds) for setting in settings})
        return max(settings, key=lambda setting: worth(tried[str(setting)]))

    plain = best([Setting(temperature=temperature) for temperature in temperatures])
    chosen = {"SimCLR": plain}
    for mode in ALIGNED:
        chosen[mode] = best([replace(plain, mode=mode, weight=weight) for weight in weights])
    return chosen, tried


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Mean]:
    """Return mean and standard error of each figure."""
    return {name: round(mean_of(rows, name), 5) for name in rows[0]}


def gains(rows: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> dict[str, Mean]:
    """Return mean and standard error of the differences to SimCLR alone, paired by seed."""
    return {name: round(difference(rows, plain, name), 5) for name in FIGURES}


def write_table(study: Study, part: str, found: dict[str, dict[str, Mean]], gained: dict[str, dict[str, Mean]]) -> None:
    """Write accuracies, gains where there are any, and distances."""
    head, formats = ["setting", "k-NN, %", "probe, %", "NMI"], ["", ".2f", ".2f", ".3f"]
    if gained:
        head += ["k-NN − SimCLR", "probe − SimCLR", "NMI − SimCLR"]
        formats += ["+.2f", "+.2f", "+.3f"]
    rows: list[list[object]] = []
    for name, row in found.items():
        known = [row, *([gained.get(name)] if gained else [])]
        cells: list[object] = [scale * some[key] if some else "" for some in known for key, scale in FIGURES.items()]
        for kind in ("one_digit", "two_digits"):
            cells.append(f"{row[f'distance_{kind}'].mean:.2f} ± {row[f'deviation_{kind}'].mean:.2f}" if len(row) > 3 else "")
        rows.append([name, *cells])
    study.table(part, [*head, "one digit", "two digits"], rows, formats, part)


def plot(found: dict[str, dict[str, Mean]], gained: dict[str, dict[str, Mean]], seeds: int) -> Figure:
    """Draw the errors of all settings, and what alignment gains."""
    reading = (
        f"Mean and standard error of {seeds} seeds, test images. Left: share of errors. Right: accuracy minus that of SimCLR "
        "alone, paired by seed."
    )
    errors = {
        name: {key: Mean(1 - row[key].mean, row[key].error) for key in JUDGES}
        for name, row in found.items()
        if name != "not trained"
    }
    title = "SimCLR on MNIST, with and without difference alignment"
    with panels(title, reading, columns=2, size=(3.2, 1.9), gap=(1.2, 0), margin=(1.1, 0.3)) as (figure, ((left, right),)):
        for axes, rows, label in ((left, errors, "errors, %"), (right, gained, "gain, points")):
            for offset, (key, name) in enumerate(JUDGES.items()):
                values, bars = zip(*(100 * row[key] for row in rows.values()), strict=True)
                places = [place + 0.2 * offset for place in range(len(rows))]
                axes.errorbar(values, places, xerr=bars, fmt="o", color=style.CYCLE[offset], markersize=5, label=name)
            axes.set_yticks([place + 0.1 for place in range(len(rows))], list(rows))
            axes.set(ylim=(len(rows) - 0.4, -0.4), xlabel=label)
        right.axvline(0, color=style.MUTED, linewidth=0.9, linestyle="--", zorder=0)
        left.legend()
    return figure


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    data = Data.load(options.data_dir, *((500, 500) if options.quick else (2000, 10_000)))
    sizes = {"images": options.images, "epochs": options.epochs, "batch": options.batch_size}

    def of(setting: Setting, part: str, seeds: Sequence[int]) -> list[dict[str, float]]:
        key = {"part": part, "setting": str(setting), **sizes}
        return study.log.by_seed(key, seeds, partial(run, study, data, setting, part))

    seeds = range(options.seed, options.seed + options.seeds)
    search_seeds = range(options.seed + 1000, options.seed + 1000 + options.search_seeds)
    few = slice(0, 1 if options.quick else None)
    chosen, tried = choose(of, search_seeds, TEMPERATURES[few], WEIGHTS[few])
    write_table(study, "validation", {name: summarize(rows) for name, rows in tried.items()}, {})
    log = RunLog(options.out / "references.csv")
    rows = {
        name: log.by_seed({"name": name, "images": options.images}, seeds, partial(reference, study, data, name))
        for name in ("pixels", "not trained")
    }
    rows |= {name: of(setting, "test", seeds) for name, setting in chosen.items()}
    found = {name: summarize(some) for name, some in rows.items()}
    gained = {mode: gains(rows[mode], rows["SimCLR"]) for mode in ALIGNED}
    write_table(study, "test", found, gained)
    study.figure(plot(found, gained, options.seeds))
    figures: dict[str, Any] = {}
    for mode in ALIGNED:
        for key in FIGURES:
            name = f"{key}_gain_{mode.replace('-', '_')}"
            figures[name], figures[f"{name}_se"] = gained[mode][key]
    return figures | {
        "setting": {name: str(setting) for name, setting in chosen.items()},
        "test": found,
        "validation": {name: round(worth(some), 5) for name, some in tried.items()},
        "options": study.sizes,
    }


if __name__ == "__main__":
    main()
