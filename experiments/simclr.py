"""Learn features of digits without labels: does it help SimCLR to align the differences of its embeddings?

After the self-supervised experiments of Chen et al., Robust Similarity Learning with Difference Alignment Regularization, ICLR
2024, at a size that one core can train: a small convolutional network on 6,000 MNIST images, two random affine views of each.
Alignment is "cluster-free" (each image is a class of its own) or "cluster-used" (clusters of the last epoch are the classes).
Temperature and λ are chosen on training images that are held out; fresh seeds are then judged on test images, by what nearest
neighbors, a linear probe and k-means find in the features before the projection head.

    python experiments/simclr.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Prints the tables, writes a figure and every run (`runs.csv`), and prints as its last line one JSON object. Runs that stand in
`runs.csv` already are not repeated: an interrupted experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_netsim.demos import MNISTDataModule
from lightning_netsim.estimators import EmbeddingMetrics, LinearProbe, PseudoLabels
from lightning_netsim.losses import DifferenceAlignmentLoss, MetricLearningLoss
from lightning_netsim.report import style

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.few_labels_training import draw_maps, transform
from experiments.run_log import RunLog, mean_and_error

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
FIGURES = ("knn", "probe", "nmi")
JUDGES = {"knn": "k-NN", "probe": "linear probe"}

Labeled = tuple[Tensor, Tensor]
"""Images, shape (N, 1, 28, 28), values in [0, 1], and labels, shape (N,)."""


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
        train, held_out = (part.tensors for part in MNISTDataModule(data_dir).load_sets())
        judged = {
            "validation": (train[0][POOL:][:validation], train[1][POOL:][:validation]),
            "test": (held_out[0][:test], held_out[1][:test]),
        }
        return cls((train[0][:POOL], train[1][:POOL]), judged)

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
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
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


class Runs:
    """Trained and judged networks, by setting and seed, kept in a log."""

    def __init__(self, path: Path, data: Data, count: int, epochs: int, batch_size: int) -> None:
        self.log = RunLog(path)
        self.data = data
        self.count, self.epochs, self.batch_size = count, epochs, batch_size

    def of(self, setting: Setting, part: str, seeds: Sequence[int]) -> list[dict[str, float]]:
        """Return what the networks of all seeds are worth, judged on images of "validation" or "test"."""
        size = {"images": self.count, "epochs": self.epochs, "batch": self.batch_size}
        return [
            self.log.get(
                {"part": part, "setting": str(setting), "seed": seed, **size},
                partial(self._run, setting, part, seed),
            )
            for seed in seeds
        ]

    def references(self, part: str, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
        """Return what pixels are worth, and the features of networks that are not trained."""
        log = RunLog(self.log.path.with_name("references.csv"))
        judged = self.data.judged[part]

        def of(name: str, seed: int) -> dict[str, float]:
            learned = self.data.draw(seed, self.count)
            untrained = train(Setting(), learned[0], seed, 0, self.batch_size).features.eval()
            return judge(untrained if name == "not trained" else nn.Flatten(), learned, judged)

        key = {"part": part, "images": self.count}
        return {
            name: [log.get({**key, "name": name, "seed": seed}, partial(of, name, seed)) for seed in seeds]
            for name in ("pixels", "not trained")
        }

    def _run(self, setting: Setting, part: str, seed: int) -> dict[str, float]:
        start = time.perf_counter()
        learned, judged = self.data.draw(seed, self.count), self.data.judged[part]
        encoder = train(setting, learned[0], seed, self.epochs, self.batch_size).eval()
        trained = time.perf_counter() - start
        return judge(encoder.features, learned, judged) | distances(encoder, judged) | {"seconds": trained}


def worth(rows: Sequence[dict[str, float]]) -> float:
    """Return what settings are chosen by: the mean of k-NN and probe accuracy, over all seeds."""
    return sum(row["knn"] + row["probe"] for row in rows) / (2 * len(rows))


def choose(
    runs: Runs, seeds: Sequence[int], temperatures: Sequence[float], weights: Sequence[float]
) -> tuple[dict[str, Setting], dict[str, list[dict[str, float]]]]:
    """Choose the temperature of SimCLR alone, then λ of each kind of alignment, on the validation split."""
    tried: dict[str, list[dict[str, float]]] = {}

    def best(settings: list[Setting]) -> Setting:
        tried.update({str(setting): runs.of(setting, "validation", seeds) for setting in settings})
        return max(settings, key=lambda setting: worth(tried[str(setting)]))

    plain = best([Setting(temperature=temperature) for temperature in temperatures])
    chosen = {"SimCLR": plain}
    for mode in ALIGNED:
        chosen[mode] = best([replace(plain, mode=mode, weight=weight) for weight in weights])
    return chosen, tried


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return mean and standard error of each figure."""
    return {name: [round(value, 5) for value in mean_and_error([row[name] for row in rows])] for name in rows[0]}


def gains(rows: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return mean and standard error of the differences to SimCLR alone, paired by seed."""
    differences = [{name: row[name] - other[name] for name in FIGURES} for row, other in zip(rows, plain, strict=True)]
    return summarize(differences)


def print_table(title: str, found: dict[str, dict[str, list[float]]], gained: dict[str, dict[str, list[float]]]) -> None:
    columns = ("k-NN, %", "probe, %", "NMI", "k-NN − SimCLR", "probe − SimCLR", "NMI − SimCLR", "one digit", "two digits")
    print(f"\n{title}\n| setting | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in found.items():
        cells = []
        for some, form in ((row, "{:.{}f} ± {:.{}f}"), (gained.get(name), "{:+.{}f} ± {:.{}f}")):
            for key in FIGURES:
                scale, digits = (1, 3) if key == "nmi" else (100, 2)
                cells.append("" if some is None else form.format(scale * some[key][0], digits, scale * some[key][1], digits))
        for kind in ("one_digit", "two_digits"):
            known = f"distance_{kind}" in row
            cells.append(f"{row[f'distance_{kind}'][0]:.2f} ± {row[f'deviation_{kind}'][0]:.2f}" if known else "")
        print(f"| {name} | {' | '.join(cells)} |")


def plot(found: dict[str, dict[str, list[float]]], gained: dict[str, dict[str, list[float]]], seeds: int) -> Figure:
    """Draw the errors of all settings, and what alignment gains."""
    reading = (
        f"Mean and standard error of {seeds} seeds, test images. Left: share of errors. Right: accuracy minus that of SimCLR "
        "alone, paired by seed."
    )
    errors = {
        name: {key: [100 - 100 * row[key][0], 100 * row[key][1]] for key in JUDGES}
        for name, row in found.items()
        if name != "not trained"
    }
    points = {name: {key: [100 * value for value in row[key]] for key in JUDGES} for name, row in gained.items()}
    with style.styled():
        figure = style.new_figure(9, 3.4, "SimCLR on MNIST, with and without difference alignment", reading)
        left, right = style.add_axes(figure, 1.1, 0.6, 4.4, 0.95), style.add_axes(figure, 5.9, 0.6, 0.3, 0.95)
        for axes, rows, label in ((left, errors, "errors, %"), (right, points, "gain, points")):
            for offset, (key, name) in enumerate(JUDGES.items()):
                values, bars = zip(*(row[key] for row in rows.values()), strict=True)
                places = [place + 0.2 * offset for place in range(len(rows))]
                color = style.CYCLE[offset]
                axes.errorbar(values, places, xerr=bars, fmt="o", color=color, markersize=5, label=name)
            axes.set_yticks([place + 0.1 for place in range(len(rows))], list(rows))
            axes.set_ylim(len(rows) - 0.4, -0.4)
            axes.set_xlabel(label)
        right.axvline(0, color=style.MUTED, linewidth=0.9, linestyle="--", zorder=0)
        left.legend()
    return figure


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True, help="directory with MNIST/raw in it")
    parser.add_argument("--quick", action="store_true", help="512 images, 2 epochs, 2 seeds: only to see that it works")
    parser.add_argument("--images", type=int, help="training images (6,000)")
    parser.add_argument("--epochs", type=int, help="epochs of training (10)")
    parser.add_argument("--batch-size", type=int, help="images in a batch, of each of which there are two views (128)")
    parser.add_argument("--seeds", type=int, help="networks for each arm (8)")
    parser.add_argument("--search-seeds", type=int, help="networks for each setting that is tried (2)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; those of the search follow 1,000 later")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/simclr"), help="directory of the log and the figure")
    options = parser.parse_args(arguments)
    full = {"images": 6000, "epochs": 10, "batch_size": 128, "seeds": 8, "search_seeds": 2}
    quick = {"images": 512, "epochs": 2, "batch_size": 64, "seeds": 2, "search_seeds": 1}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return the figures of its last line."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    data = Data.load(options.data_dir, *((500, 500) if options.quick else (2000, 10_000)))
    runs = Runs(options.out / "runs.csv", data, options.images, options.epochs, options.batch_size)
    seeds = range(options.seed, options.seed + options.seeds)
    search_seeds = range(options.seed + 1000, options.seed + 1000 + options.search_seeds)
    few = slice(0, 1 if options.quick else None)
    chosen, tried = choose(runs, search_seeds, TEMPERATURES[few], WEIGHTS[few])
    print_table("Validation", {name: summarize(rows) for name, rows in tried.items()}, {})
    rows = runs.references("test", seeds) | {name: runs.of(setting, "test", seeds) for name, setting in chosen.items()}
    found = {name: summarize(some) for name, some in rows.items()}
    gained = {mode: gains(rows[mode], rows["SimCLR"]) for mode in ALIGNED}
    print_table("Test", found, gained)
    style.save_figure(plot(found, gained, options.seeds), options.out / "simclr.png", dpi=100)
    print(f"\nThe figure and all runs are in {options.out}/")
    figures: dict[str, Any] = {}
    for mode in ALIGNED:
        for key in FIGURES:
            name = f"{key}_gain_{mode.replace('-', '_')}"
            figures[name], figures[f"{name}_se"] = gained[mode][key]
    figures |= {
        "setting": {name: str(setting) for name, setting in chosen.items()},
        "test": found,
        "validation": {name: round(worth(some), 5) for name, some in tried.items()},
        "options": {
            name: getattr(options, name) for name in ("images", "epochs", "batch_size", "seeds", "search_seeds", "seed")
        },
    }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
