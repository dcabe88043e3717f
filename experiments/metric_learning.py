"""Align the differences of embeddings: are classes that training has not seen told apart better?

After Chen et al., ICLR 2024 (DASL). Networks are trained with N-pair, Proxy-Anchor, contrastive and triplet loss, each alone
and beside the alignment of distances (squared L2 or L2) or of difference vectors (signed or absolute, as in the paper). They
are judged on other classes: five of scikit-learn's ten digits, and the evaluation alphabets of Omniglot, for which learning
rates and weights are chosen on held-out background alphabets.

    python experiments/metric_learning.py [--quick] [--data digits omniglot] [--data-dir DIRECTORY] [--out DIRECTORY]

Beside the tables it writes figures and every run (`runs.csv`). Runs that stand there already are not repeated: an interrupted
experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NPairsLoss
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Size, Study, mean_of, script
from lab.data import Labeled, read_omniglot
from lab.figures import panels
from lab.training import take_step
from lightning_netsim.estimators import EmbeddingMetrics
from lightning_netsim.losses import ContrastiveLoss, DifferenceAlignmentLoss, MetricLearningLoss
from lightning_netsim.report import style

SIZE = 64
# The proxies start anywhere and have far to go.
PROXY_SPEED = 10
# The last is a control: N-pair has no temperature, and cosine similarities between -1 and 1 make a flat softmax.
LOSSES = ("npair", "proxy_anchor", "contrastive", "triplet", "npair_sharp")
TEMPERATURE = 0.1
# Arguments of DifferenceAlignmentLoss; the first is its default. The last two compare vectors, as the paper does.
FORMS: dict[str, dict[str, str]] = {
    "distance": {"difference": "distance", "norm": "squared_l2"},
    "distance_l2": {"difference": "distance", "norm": "l2"},
    "signed": {"difference": "signed", "norm": "squared_l2"},
    "abs": {"difference": "abs", "norm": "squared_l2"},
}
DIGITS, OMNIGLOT, VALIDATION = "digits", "omniglot", "omniglot validation"
# Classes in a batch and images of each.
BATCH = {DIGITS: (5, 8), OMNIGLOT: (32, 4), VALIDATION: (32, 4)}
VALIDATION_ALPHABETS = 5
# Curves along training, distances and recall of seen classes take one of so many classes: all digits, a quarter of Omniglot.
THINNED = {DIGITS: 1, OMNIGLOT: 4, VALIDATION: 4}
POINTS = {DIGITS: 10, OMNIGLOT: 4, VALIDATION: 1}
# Distances of normalized embeddings lie in [0, 2]; those of this many images are counted in bins.
BINS, COUNTED = 50, 1500

# The weights λ that are tried. The first form is the default of the library; its λ = 1 is what the bounds are on.
WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    DIGITS: {"distance": (0.3, 1.0, 3.0), "distance_l2": (0.1, 1.0), "signed": (0.1, 1.0), "abs": (1.0,)},
    VALIDATION: {"distance": (0.3, 1.0, 3.0), "distance_l2": (0.1, 1.0), "signed": (0.1, 1.0)},
}
QUICK_WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {key: {"distance": (1.0,)} for key in WEIGHTS}
LEARNING_RATES = (1e-3, 3e-3)
DIGITS_RATE = 1e-3
RECALLS = {"recall@1": "R@1", "recall@2": "R@2", "recall@4": "R@4", "recall@8": "R@8", "map@r": "MAP@R", "nmi": "NMI"}
SIZES = {
    "data": Size((DIGITS, OMNIGLOT), None, "which data sets", choices=(DIGITS, OMNIGLOT)),
    "steps": Size((300, 250), (20, 10), "of training, on digits and on Omniglot"),
    "seeds": Size((12, 5, 1), (2, 1, 1), "how many on digits, on Omniglot, and there to choose by"),
}

Result = dict[str, Any]


class Run(NamedTuple):
    """All that the outcome of a training depends on, beside the images.

    Attributes:
        data: "digits"; "omniglot", judged on the alphabets of the evaluation set; or "omniglot validation", where alphabets of
            the background set are held out.
        loss: one of `LOSSES`.
        form: one of `FORMS`, or "none".
        weight: λ, of the alignment.
        learning_rate: of Adam.
        steps: of training.
        seed: of initial weights, batches, the chain of the alignment and, for digits, the classes that are seen.
    """

    data: str
    loss: str
    form: str
    weight: float
    learning_rate: float
    steps: int
    seed: int


class Split(NamedTuple):
    """Images of classes that are trained on, and of classes that are only judged."""

    seen: Labeled
    unseen: Labeled


def split_digits(seed: int) -> Split:
    """Return five classes of scikit-learn's digits to train on, drawn by the seed, and the other five."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(targets, dtype=torch.int64)
    seen = torch.isin(labels, torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:5])
    return Split((images[seen], labels[seen]), (images[~seen], labels[~seen]))


@dataclass(frozen=True)
class Omniglot:
    """Both sets of Omniglot, at 28×28 pixels; characters of the evaluation set are numbered after those of the background set.

    Attributes:
        background: images and labels.
        alphabets: shape (N,), the alphabet of each background image.
        evaluation: images and labels.
    """

    background: Labeled
    alphabets: Tensor
    evaluation: Labeled

    @classmethod
    def load(cls, data_dir: str, alphabets: int | None = None) -> Omniglot:
        """Read `data_dir/omniglot/images_background.zip` and `images_evaluation.zip`, or the first alphabets of each."""
        images, labels, of_alphabet = read(data_dir, "images_background.zip", alphabets)
        others, other_labels, _ = read(data_dir, "images_evaluation.zip", alphabets)
        return cls((images, labels), of_alphabet, (others, other_labels + 1 + labels.max()))

    def split(self, data: str) -> Split:
        """Return background against evaluation alphabets or, to choose by, the background alphabets in two parts."""
        if data == OMNIGLOT:
            return Split(self.background, self.evaluation)
        alphabets = self.alphabets.unique()
        order = alphabets[torch.randperm(len(alphabets), generator=torch.Generator().manual_seed(0))]
        seen = torch.isin(self.alphabets, order[VALIDATION_ALPHABETS:])
        images, labels = self.background
        return Split((images[seen], labels[seen]), (images[~seen], labels[~seen]))


def read(data_dir: str, file: str, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, shape (N, 1, 28, 28), and the numbers of their characters and of the first `limit` alphabets."""

    def of_first_alphabets(names: list[str]) -> list[str]:
        alphabets = sorted({name.split("/")[1] for name in names})[:limit]
        return [name for name in names if name.split("/")[1] in alphabets]

    names, pictures = read_omniglot(data_dir, file, of_first_alphabets)
    # BOX averages over the area of each new pixel, also where the ratio of sizes is no whole number.
    pixels = np.stack([np.asarray(picture.resize((28, 28), Image.Resampling.BOX)) for picture in pictures])
    characters, alphabets = ([name.rsplit("/", count)[0] for name in names] for count in (1, 2))
    labels, of_alphabet = (torch.from_numpy(np.unique(some, return_inverse=True)[1]) for some in (characters, alphabets))
    return 1 - torch.as_tensor(pixels, dtype=torch.float32).unsqueeze(1) / 255, labels, of_alphabet


def make_network(data: str) -> nn.Module:
    """Return what embeds digits of 8×8 pixels, or drawings of 28×28 by three convolutions with stride 2 and a linear layer."""
    if data == DIGITS:
        convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        return nn.Sequential(*convolutions, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, SIZE))
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, SIZE))


class SharpNPairsLoss(nn.Module):
    """N-pair loss of cosine similarities divided by a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        scaled: Tensor = self.loss(F.normalize(embeddings, dim=1) / TEMPERATURE**0.5, labels, indices_tuple)
        return scaled


def make_loss(name: str, classes: int) -> nn.Module:
    """Return one of `LOSSES`, with the defaults of its class."""
    if name == "npair_sharp":
        return MetricLearningLoss(SharpNPairsLoss())
    if name == "contrastive":
        return ContrastiveLoss()
    if name == "proxy_anchor":
        return MetricLearningLoss("ProxyAnchorLoss", {"num_classes": classes, "embedding_size": SIZE})
    return MetricLearningLoss({"npair": "NPairsLoss", "triplet": "TripletMarginLoss"}[name])


class Training:
    """A network in training; whatever is random depends on the seed alone, not on loss or alignment."""

    def __init__(self, run: Run, split: Split) -> None:
        self.run = run
        self.images = split.seen[0]
        classes, self.labels = split.seen[1].unique(return_inverse=True)
        self.members = [(self.labels == place).nonzero().squeeze(1) for place in range(len(classes))]
        self.draws = torch.Generator().manual_seed(run.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.network = make_network(run.data)
            self.loss = make_loss(run.loss, len(classes))
        self.alignment = None if run.form == "none" else DifferenceAlignmentLoss(**FORMS[run.form], seed=run.seed)
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        groups += [{"params": list(self.loss.parameters()), "lr": PROXY_SPEED * run.learning_rate}]
        self.optimizer = torch.optim.Adam(groups, lr=run.learning_rate)

    def draw(self) -> Tensor:
        """Return the places of the images of a batch: as many of each of its classes."""
        number, each = BATCH[self.run.data]
        chosen = torch.randperm(len(self.members), generator=self.draws)[:number].tolist()
        return torch.cat([of[torch.randperm(len(of), generator=self.draws)[:each]] for of in (self.members[c] for c in chosen)])

    def step(self) -> None:
        self.network.train()
        places = self.draw()
        embeddings, labels = self.network(self.images[places]), self.labels[places]
        loss = self.loss(embeddings, labels)
        if self.alignment is not None:
            loss = loss + self.run.weight * self.alignment(embeddings, labels)
        take_step(self.optimizer, loss)


def train(run: Run, split: Split) -> dict[str, Any]:
    """Train a network and return what is measured of it: shares in [0, 1], the curve of R@1 and the counts of distances."""
    training, every = Training(run, split), THINNED[run.data]
    seen, some = thin(split.seen, every), thin(split.unseen, every)
    stops = torch.linspace(0, run.steps, POINTS[run.data] + 1).round().int().tolist()
    curve = {}
    for step in range(run.steps + 1):
        if step in stops:
            curve[str(step)] = measure(training.network, some, recall_only=True)["recall@1"]
        if step < run.steps:
            training.step()
    found = measure(training.network, split.unseen, run.data == VALIDATION)
    found["seen_recall@1"] = measure(training.network, seen, recall_only=True)["recall@1"]
    distances = {name: count_distances(training.network, part) for name, part in (("seen", seen), ("unseen", some))}
    return found | {"curve": curve, "distances": distances}


def thin(part: Labeled, every: int) -> Labeled:
    """Return the images of one of `every` classes."""
    images, labels = part
    kept = torch.isin(labels, labels.unique()[::every])
    return images[kept], labels[kept]


@torch.no_grad()
def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Return embeddings of length 1."""
    network.eval()
    return F.normalize(torch.cat([network(some) for some in images.split(1000)]), dim=1)


def measure(network: nn.Module, part: Labeled, recall_only: bool = False) -> dict[str, float]:
    """Return the figures of `EmbeddingMetrics`, or R@1 alone."""
    few = {"recall_at": (1,), "num_neighbors": 1, "map_at_r": False, "nmi": False}
    metrics = EmbeddingMetrics(**(few if recall_only else {}))
    metrics.update(embed(network, part[0]), part[1])
    return {name: round(float(value), 5) for name, value in metrics.compute().items()}


def count_distances(network: nn.Module, part: Labeled) -> dict[str, Any]:
    """Return the histogram over [0, 2] of distances between images of different classes, their mean and deviation."""
    images, labels = part
    places = torch.linspace(0, len(labels) - 1, min(COUNTED, len(labels))).round().long()
    embeddings, labels = embed(network, images[places]).double(), labels[places]
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    distances = torch.cdist(embeddings, embeddings)[first, second][labels[first] != labels[second]]
    counts = torch.histc(distances, bins=BINS, min=0, max=2).int().tolist()
    return {"counts": counts, "mean": round(float(distances.mean()), 4), "sd": round(float(distances.std()), 4)}


class Arm(NamedTuple):
    """What is trained on every seed: a loss, and an alignment with its weight."""

    data: str
    loss: str
    form: str
    weight: float
    learning_rate: float


class Experiment:
    """All trainings, by arm."""

    def __init__(self, study: Study, split: Callable[[str, int], Split]) -> None:
        self.study, self.split, (digits, omniglot) = study, split, study.options.steps
        self.weights = QUICK_WEIGHTS if study.options.quick else WEIGHTS
        self.steps = {DIGITS: digits, OMNIGLOT: omniglot, VALIDATION: omniglot}
        numbers = study.options.seeds
        self.seeds = {DIGITS: range(numbers[0]), OMNIGLOT: range(numbers[1]), VALIDATION: range(1000, 1000 + numbers[2])}

    def results(self, arm: Arm, steps: int | None = None) -> list[Result]:
        """Return what was measured of an arm, one result a seed."""
        steps = self.steps[arm.data] if steps is None else steps
        rows = self.study.log.by_seed(
            arm._asdict() | {"steps": steps}, self.seeds[arm.data], lambda seed: self._train(Run(*arm, steps, seed))
        )
        return [row["measured"] for row in rows]

    def _train(self, run: Run) -> Result:
        start = time.perf_counter()
        measured = train(run, self.split(run.data, run.seed))
        return {"measured": measured, "seconds": round(time.perf_counter() - start, 1)}

    def score(self, arm: Arm) -> float:
        return statistics.mean(result["recall@1"] for result in self.results(arm))

    def forms(self, data: str, loss: str) -> dict[str, tuple[float, ...]]:
        """Return the weights that are tried of each form; the control is tried with the default form alone."""
        tried = self.weights[data]
        return {"distance": tried["distance"]} if loss == "npair_sharp" else tried

    def sweep(self, data: str, rate: Callable[[str], float]) -> list[Arm]:
        """Return every loss alone and with every form and weight."""
        arms = []
        for loss in LOSSES:
            arms.append(Arm(data, loss, "none", 0.0, rate(loss)))
            tried = self.forms(data, loss).items()
            arms += [Arm(data, loss, form, weight, rate(loss)) for form, weights in tried for weight in weights]
        return arms

    def learning_rate(self, loss: str) -> float:
        """Return the learning rate with which a loss alone does best on held-out background alphabets."""
        rates = (DIGITS_RATE,) if self.study.options.quick else LEARNING_RATES
        return max(rates, key=lambda rate: self.score(Arm(VALIDATION, loss, "none", 0.0, rate)))

    def best_weight(self, loss: str, form: str) -> float:
        """Return the weight that does best there."""
        rate = self.learning_rate(loss)
        return max(self.weights[VALIDATION][form], key=lambda weight: self.score(Arm(VALIDATION, loss, form, weight, rate)))

    def chosen(self) -> list[Arm]:
        """Return the arms for the evaluation alphabets: each form with its best weight, and the default."""
        arms = []
        for loss in LOSSES:
            rate = self.learning_rate(loss)
            arms.append(Arm(OMNIGLOT, loss, "none", 0.0, rate))
            for form, weights in self.forms(VALIDATION, loss).items():
                picked = {self.best_weight(loss, form), *((1.0,) if form == "distance" and 1.0 in weights else ())}
                arms += [Arm(OMNIGLOT, loss, form, weight, rate) for weight in sorted(picked)]
        return arms


def gain(results: Sequence[Result], reference: Sequence[Result], key: str = "recall@1") -> dict[str, float]:
    """Return mean and standard error of the differences seed by seed, in points, and of how many seeds they are above 0."""
    differences = [100 * (one[key] - other[key]) for one, other in zip(results, reference, strict=True)]
    found = round(mean_of(differences), 2)
    return {"mean": found.mean, "se": found.error, "wins": sum(value > 0 for value in differences)}


def summarize(experiment: Experiment, arms: Iterable[Arm]) -> list[dict[str, Any]]:
    """Return, for each arm, means in percent and the gain over the same loss alone."""
    rows, alone = [], {arm.loss: experiment.results(arm) for arm in arms if arm.form == "none"}
    for arm in arms:
        results = experiment.results(arm)
        keys = [key for key in (*RECALLS, "seen_recall@1") if key in results[0]]
        row = arm._asdict() | {key: round(100 * statistics.mean(result[key] for result in results), 2) for key in keys}
        for part in ("seen", "unseen"):
            spreads = [result["distances"][part]["sd"] / max(result["distances"][part]["mean"], 1e-9) for result in results]
            row[f"{part}_spread"] = round(statistics.mean(spreads), 3)
            row[f"{part}_distance"] = round(statistics.mean(result["distances"][part]["mean"] for result in results), 3)
        row["counts"] = np.mean([result["distances"]["unseen"]["counts"] for result in results], axis=0).round(1).tolist()
        curves = [result["curve"] for result in results]
        row["curve"] = {step: round(100 * statistics.mean(curve[step] for curve in curves), 2) for step in curves[0]}
        rows.append(row | {"gain": gain(results, alone[arm.loss])})
    return rows


def references(experiment: Experiment, data: str) -> dict[str, dict[str, float]]:
    """Return the figures of unseen classes, in percent, of pixels and of networks that are not trained."""
    seeds, few = (experiment.seeds[data] if data == DIGITS else [0]), data == VALIDATION
    pixels = [measure(nn.Flatten(), experiment.split(data, seed).unseen, recall_only=few) for seed in seeds]
    untrained = experiment.results(Arm(data, LOSSES[0], "none", 0.0, DIGITS_RATE), steps=0)
    found = {"pixels": pixels, "untrained": untrained}
    return {
        name: {key: round(100 * statistics.mean(one[key] for one in some), 2) for key in RECALLS if key in some[0]}
        for name, some in found.items()
    }


def write_table(study: Study, data: str, rows: Sequence[dict[str, Any]], reference: dict[str, dict[str, float]]) -> None:
    keys = [key for key in RECALLS if key in rows[0]]
    cells: list[list[object]] = [
        [name, "", "", *(figures[key] for key in keys), *[""] * 5] for name, figures in reference.items()
    ]
    for row in rows:
        known = row["gain"] if row["form"] != "none" else None
        error = f" ± {known['se']:.1f}" if known and known["se"] else ""  # One seed has none.
        gained = [f"{known['mean']:+.1f}{error}", str(known["wins"])] if known else ["", ""]
        ends = [row["seen_recall@1"], row["unseen_distance"], row["unseen_spread"]]
        cells.append([row["loss"], row["form"], f"{row['weight']:g}", *(row[key] for key in keys), *gained, *ends])
    titles = [*(RECALLS[key] for key in keys), "R@1 gain", "seeds above", "R@1 seen", "distance between", "spread"]
    formats = ["", "", "", *[".1f"] * len(keys), "", "", ".1f", ".3f", ".2f"]
    study.table(data, ["loss", "alignment", "λ", *titles], cells, formats, f"{data}, in %", left=2)


def headline(experiment: Experiment, tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the gains of the default alignment at λ = 1 and, for Omniglot, also at the weight chosen beforehand."""
    found = {}
    for data, rows in tables.items():
        for row in rows if data != VALIDATION else ():
            if row["form"] == "distance":
                name = {"proxy_anchor": "proxy"}.get(row["loss"], row["loss"]) + "_gain"
                names = [name if data == DIGITS else f"omniglot_{name}"] * (row["weight"] == 1)
                if data == OMNIGLOT and row["weight"] == experiment.best_weight(row["loss"], "distance"):
                    names.append(f"omniglot_{name}_chosen")
                for key in names:
                    found |= {key: row["gain"]["mean"], f"{key}_se": row["gain"]["se"]}
    return found


def draw_grid(title: str, reading: str, tables: dict[str, Any], draw: Callable[[Axes, Any], None], x: str, y: str) -> Figure:
    """Draw one panel for each table of rows (down) and loss (across)."""
    lines: dict[str, Any] = {}
    shape = {"rows": len(tables), "columns": len(LOSSES), "size": (1.85, 1.65), "gap": (0.45, 0.7), "margin": (0.65, 1.2)}
    with panels(title, reading, **shape) as (figure, grid):
        for line, (data, rows) in zip(grid, tables.items(), strict=True):
            for axes, loss in zip(line, LOSSES, strict=True):
                draw(axes, [row for row in rows if row["loss"] == loss])
                axes.set_title(f"{data}: {loss}", fontsize=8.5, loc="left")
                axes.set(xlabel=x, ylabel=y if axes is line[0] else "")
                lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(lines.values(), lines, loc="upper right", bbox_to_anchor=(1, 1 - 1.1 / figure.get_figheight()))
    return figure


COLORS = {"none": style.INK, **dict(zip(WEIGHTS[DIGITS], style.CYCLE, strict=False))}


def draw_curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        steps = [int(step) for step in row["curve"]]
        axes.plot(steps, list(row["curve"].values()), color=COLORS[row["form"]], linewidth=1.3, label=row["form"])


def draw_distances(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = (np.arange(BINS) + 0.5) * 2 / BINS
    for row in rows:
        share = np.array(row["counts"]) / sum(row["counts"])
        axes.plot(places, share, color=COLORS[row["form"]], linewidth=1.3, label=row["form"], drawstyle="steps-mid")
    axes.set(yticks=[], ylim=(0, 0.2), xlim=(0, 2))


def draw_weights(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for form, color in COLORS.items():
        some = [row for row in rows if row["form"] == form]
        values = [row["recall@1"] for row in some]
        if form == "none":
            axes.axhline(values[0], color=color, linewidth=1, linestyle="--", label=form)
        elif some:
            axes.plot([row["weight"] for row in some], values, "o-", color=color, markersize=3.5, linewidth=1.3, label=form)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_figures(experiment: Experiment, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Write the three figures."""

    def shown(row: dict[str, Any]) -> bool:
        if row["data"] == DIGITS or row["form"] == "none":
            return row["weight"] in (0, 1)
        return bool(row["weight"] == experiment.best_weight(row["loss"], row["form"]))

    judged = {data: [row for row in rows if shown(row)] for data, rows in tables.items() if data != VALIDATION}
    weights = {data: rows for data, rows in tables.items() if data != OMNIGLOT}
    of = "Mean over the seeds. Digits: λ = 1; Omniglot: the weight chosen on validation alphabets."
    curves = f"R@1 (%) on unseen classes, on Omniglot every fourth of them. Vertical axes differ. {of}"
    title = "Unseen classes along training"
    distances = (
        f"Distances of normalized embeddings of images of different unseen classes, in bins of 0.04, cut off above. {of}"
    )
    accuracy = "R@1 (%) on unseen classes against the weight of the alignment; dashed: the loss alone. Vertical axes differ."
    for name, figure in {
        "curves": draw_grid(title, curves, judged, draw_curves, "steps", "R@1 (%)"),
        "distances": draw_grid("Distances between unseen classes", distances, judged, draw_distances, "distance", "share"),
        "weights": draw_grid("How much alignment", accuracy, weights, draw_weights, "λ", "R@1 (%)"),
    }.items():
        experiment.study.figure(figure, f"metric_learning_{name}", dpi=75)


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    characters = Omniglot.load(options.data_dir, 7 if options.quick else None) if OMNIGLOT in options.data else None
    # The splits of Omniglot are the same for all seeds, and one is 100 MB.
    split = cache(lambda data, seed: split_digits(seed) if data == DIGITS else characters.split(data))
    experiment = Experiment(study, lambda data, seed: split(data, seed if data == DIGITS else 0))
    arms: dict[str, list[Arm]] = {}
    if DIGITS in options.data:
        arms[DIGITS] = experiment.sweep(DIGITS, lambda loss: DIGITS_RATE)
    if OMNIGLOT in options.data:
        arms[VALIDATION] = experiment.sweep(VALIDATION, experiment.learning_rate)
        arms[OMNIGLOT] = experiment.chosen()
    tables = {data: summarize(experiment, some) for data, some in arms.items()}
    reference = {data: references(experiment, data) for data in tables}
    for data, rows in tables.items():
        write_table(study, data, rows, reference[data])
    draw_figures(experiment, tables)
    kept = ("loss", "form", "weight", "learning_rate", *RECALLS, "seen_recall@1", "unseen_spread", "gain")
    return headline(experiment, tables) | {
        "reference": reference,
        "rows": {data: [{key: row[key] for key in kept if key in row} for row in rows] for data, rows in tables.items()},
        "options": study.sizes,
        "seconds": study.seconds,
    }


if __name__ == "__main__":
    main()
