"""Train on few labels: does it pay to make a network treat an image and its transformed self alike, in its gradients?

After Charpiat et al., NeurIPS 2019, section 5 of the supplementary material ("Enforcing similarity"): 100 labeled MNIST images,
with and without 5,000 unlabeled ones, and invariance to random affine maps. Augmentation alone and two kinds of consistency of
outputs stand beside every criterion on gradients. Weights, schedules, layers and directions are chosen on training images that
are held out; the chosen setting of each arm is then trained on fresh seeds and judged on the test images.

    python experiments/few_labels.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Beside the tables it writes a figure and every run (`runs.csv`). Runs that stand there already are not repeated: an interrupted
experiment goes on where it was; delete the file to start again.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Size, Study, script
from lab.affine import draw_maps, transform
from lab.data import read_mnist
from lab.figures import panels
from lab.networks import SmallNetwork
from lab.training import accuracy, take_step
from lightning_netsim import JacobianOperator
from lightning_netsim.functional.similarity import pair_similarity_loss
from lightning_netsim.losses import (
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    MinibatchSimilarityLoss,
    PairSimilarityLoss,
    TangentLoss,
)
from lightning_netsim.losses.kernel_sums import pair_similarity
from lightning_netsim.report import style

SIZES = {
    "steps": Size(400, 40, "steps of training"),
    "search_steps": Size(200, 10, "steps of training while settings are chosen"),
    "seeds": Size(6, 2, "networks for each arm"),
    "search_seeds": Size(2, 1, "networks for each setting that is tried"),
    "seed": Size(0, None, "the first seed; those of the search follow 1,000 later"),
}
CLASSES = 10
# The last training images are the validation split; labeled and unlabeled images come from those before them.
POOL = 50_000
UNLABELED = 5_000
# Labeled images of each class in a batch, and images without labels.
PER_CLASS, UNLABELED_BATCH = 5, 50
LEARNING_RATE = 3e-3
CONSISTENCY = ("logits", "probabilities")
LAYERS: dict[str, str | list[str]] = {"all": "trainable", "last": ["7"], "but_last": ["0", "2", "5"], "first": ["0"]}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "up": lambda done: min(1.0, 2 * done),
    "down": lambda done: 1.0 - done,
    "early": lambda done: float(done < 0.25),
}
SMALL_STEP = 0.05
TEMPERATURE = 0.1


# An arm that gains less than this over augmentation on the validation split is not carried on to the test images.
WORTH = 0.01
# Labeled images of each class in all, and with fewer; how many times as long augmentation alone is trained for comparison.
LABELED, FEWER, LONGER = 10, 2, 6


@dataclass(frozen=True)
class Term:
    """One term of the loss, beside the cross-entropy of the labeled images.

    Attributes:
        kind: one of `CONSISTENCY`, or a criterion on gradients.
        weight: its factor, times what the schedule says.
        schedule: one of `SCHEDULES`.
        layers: one of `LAYERS`, whose gradients are compared.
        directions: of the logits: one random one that stays ("shared") or is drawn anew in each step ("fresh"), one that
            depends on the class ("target", "contrast"; without a label, on the predicted one), or "all".
        target: q of the density.
        stop: whether only one of two views is moved towards the other.
    """

    kind: str
    weight: float
    schedule: str = "constant"
    layers: str = "all"
    directions: str = "shared"
    target: float = 0.1
    stop: bool = False

    def __str__(self) -> str:
        extras = [self.schedule] * (self.schedule != "constant")
        if self.kind not in CONSISTENCY:
            extras += [self.layers] * (self.layers != "all") + [self.directions] * (self.directions != "shared")
            extras += [f"q={self.target:g}"] * (self.kind == "density") + ["one side"] * self.stop
        return " ".join([f"{self.kind} {self.weight:g}", *extras])

    def factor(self, done: float) -> float:
        """Return the weight when the share `done` of the steps has been taken."""
        return self.weight * SCHEDULES[self.schedule](done)


@dataclass(frozen=True)
class Setting:
    """What a network is trained on: which images the terms are computed from, and the terms.

    Attributes:
        images: "labeled" or "unlabeled".
        terms: at most one of them a criterion on gradients.
        longer: how many times as many steps are taken.
    """

    images: str = "labeled"
    terms: tuple[Term, ...] = ()
    longer: int = 1

    def __str__(self) -> str:
        terms = " + ".join(map(str, self.terms)) or "augmentation"
        return f"{self.images}: {terms}" + f" ×{self.longer}" * (self.longer > 1)


@dataclass(frozen=True)
class Data:
    """Training, validation and test images with labels; the last two with their transformed selves."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def load(cls, data_dir: str, validation: int, test: int) -> Data:
        (images, labels), held_out = read_mnist(data_dir)
        judged = []
        for seed, (some, theirs) in enumerate(((images[POOL:][:validation], labels[POOL:][:validation]), held_out)):
            some, theirs = some[:test], theirs[:test]
            maps = draw_maps(len(some), torch.Generator().manual_seed(10**6 + seed))
            judged.append((some, theirs, transform(some, maps)))
        return cls((images[:POOL], labels[:POOL]), *judged)

    def choose(self, seed: int, per_class: int) -> tuple[Tensor, Tensor]:
        """Return the places of the labeled images, shape (CLASSES, per_class), and of the unlabeled ones."""
        order = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(seed))
        labels = self.train[1][order]
        labeled = torch.stack([order[labels == digit][:per_class] for digit in range(CLASSES)])
        # The first 1,000 are put aside whatever the number of labels, so that the unlabeled images are the same for all.
        return labeled, order[1000 : 1000 + UNLABELED]


class Training:
    """A network that is trained under one setting; whatever is random depends on the seed alone, not on the setting."""

    def __init__(self, setting: Setting, data: Data, seed: int, per_class: int, steps: int) -> None:
        self.setting = setting
        self.steps = steps * setting.longer
        self.images, self.labels = data.train
        self.labeled, self.unlabeled = data.choose(seed, per_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = SmallNetwork()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.draws, self.other_draws, self.direction_draws = (torch.Generator().manual_seed(3 * seed + i) for i in range(3))
        self.direction = F.normalize(torch.randn(CLASSES, 1, generator=self.direction_draws), dim=0)
        self.operators = {term: self._operator(term) for term in setting.terms if term.kind not in CONSISTENCY}

    def _operator(self, term: Term) -> JacobianOperator:
        random = term.directions in ("shared", "fresh")
        directions: Any = (lambda outputs: outputs @ self.direction) if random else term.directions
        return JacobianOperator(self.network, directions=directions, parameters=LAYERS[term.layers], create_graph=True)

    def run(self) -> nn.Module:
        for step in range(self.steps):
            self.step(step / self.steps)
        return self.network

    def step(self, done: float) -> None:
        """Take one step of Adam, after the share `done` of all."""
        places = self.labeled.gather(
            1, torch.randint(self.labeled.shape[1], (CLASSES, PER_CLASS), generator=self.draws)
        ).flatten()
        images, labels = self.images[places], self.labels[places]
        first = transform(images, draw_maps(len(images), self.draws))
        active = [(term, term.factor(done)) for term in self.setting.terms if term.factor(done) > 0]
        loss = self._loss(images, first, labels, active)
        take_step(self.optimizer, loss)

    def _loss(self, images: Tensor, first: Tensor, labels: Tensor, active: list[tuple[Term, float]]) -> Tensor:
        if not active:
            return F.cross_entropy(self.network(first), labels)
        known: Tensor | None = labels
        if self.setting.images == "unlabeled":
            places = self.unlabeled[torch.randint(len(self.unlabeled), (UNLABELED_BATCH,), generator=self.other_draws)]
            images, known = self.images[places], None
        if any(term.directions == "fresh" for term, _ in active):
            self.direction = F.normalize(torch.randn(CLASSES, 1, generator=self.direction_draws), dim=0)
        single = all(term.kind in ("group", "pair", "minibatch", "density", "tangent") for term, _ in active)
        views = [
            transform(images, draw_maps(len(images), self.other_draws)) for _ in range(1 if single or known is not None else 2)
        ]
        if known is not None:
            views = [first] if single else [first, *views]
        outputs, terms = self._terms(torch.cat(views), known, len(images), active)
        logits = outputs[: len(labels)] if known is not None else self.network(first)
        return F.cross_entropy(logits, labels) + terms

    def _terms(
        self, inputs: Tensor, known: Tensor | None, count: int, active: list[tuple[Term, float]]
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of `inputs`, views of `count` images one after the other, and the weighted sum of the terms."""
        gradients = [term for term, _ in active if term.kind not in CONSISTENCY]
        if gradients:
            classes = known
            if classes is None and gradients[0].directions in ("target", "contrast"):
                with torch.no_grad():
                    classes = self.network(inputs[:count]).argmax(1)
            operator = self.operators[gradients[0]]
            jacobian = operator(inputs, None if classes is None else classes.repeat(len(inputs) // count))
            outputs = jacobian.outputs
            groups = (outputs.detach()[:count].argmax(1) if known is None else known).repeat(len(inputs) // count)
            batch = GradientBatch(operator, inputs, groups, lambda: jacobian)
        else:
            outputs = self.network(inputs)
        terms = [
            weight * (consistency(term.kind, outputs) if term.kind in CONSISTENCY else criterion(term, batch, self.other_draws))
            for term, weight in active
        ]
        return outputs, torch.stack(terms).sum()


def consistency(kind: str, outputs: Tensor) -> Tensor:
    """Return the mean squared difference of the logits, or of the probabilities, of two views."""
    first, second = (outputs if kind == "logits" else outputs.softmax(1)).chunk(2)
    return F.mse_loss(first, second)


def criterion(term: Term, batch: GradientBatch, generator: torch.Generator) -> Tensor:
    """Return a criterion on the gradients of a batch; where it compares two views, they are the halves of the batch."""
    count = len(batch.inputs) // 2
    if term.kind == "invariance":
        jacobian = batch.all_gradients
        first, second = jacobian.select(slice(0, count)), jacobian.select(slice(count, None))
        return pair_similarity_loss(pair_similarity(first.detached() if term.stop else first, second))
    if term.kind == "contrastive":
        similarity = (batch.similarity() / TEMPERATURE).fill_diagonal_(-math.inf)
        return F.cross_entropy(similarity, torch.arange(2 * count).roll(count))
    if term.kind == "tangent":
        maps = draw_maps(len(batch.inputs), generator, SMALL_STEP)
        return TangentLoss(lambda images: (transform(images, maps) - images) / SMALL_STEP)(batch)
    losses = {"group": GroupSimilarityLoss(), "pair": PairSimilarityLoss(), "minibatch": MinibatchSimilarityLoss()}
    return (DensityLoss(term.target) if term.kind == "density" else losses[term.kind])(batch)


def measure(setting: Setting, data: Data, split: str, per_class: int, steps: int, seed: int) -> dict[str, float]:
    """Train a network and return its accuracies on clean and transformed images of "validation" or "test"."""
    start = time.perf_counter()
    network = Training(setting, data, seed, per_class, steps).run()
    images, labels, moved = getattr(data, split)
    found = {"clean": accuracy(network, images, labels), "transformed": accuracy(network, moved, labels)}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


Axis = Callable[[Term], list[Term]]


def vary(name: str, values: Iterable[Any]) -> Axis:
    return lambda term: [replace(term, **{name: value}) for value in values]


def switch(**changes: Any) -> Axis:
    return lambda term: [replace(term, **changes)]


def rescale(*factors: float) -> Axis:
    return lambda term: [replace(term, weight=float(f"{term.weight * factor:.2g}")) for factor in factors]


WEIGHTS = {
    "logits": (0.1, 0.3, 1.0, 3.0, 10.0),
    "probabilities": (0.3, 1.0, 3.0, 10.0, 30.0),
    "invariance": (0.03, 0.1, 0.3, 1.0),
    "group": (0.03, 0.1, 0.3, 1.0),
    "contrastive": (0.03, 0.1, 0.3, 1.0),
    "pair": (0.03, 0.1),
    "minibatch": (0.01, 0.03, 0.1),
    "density": (0.1, 0.3, 1.0),
    "tangent": (3e-5, 3e-4),
}
KINDS = {
    "labeled": tuple(WEIGHTS),
    "unlabeled": ("logits", "probabilities", "invariance", "group", "contrastive", "density", "tangent"),
}
QUICK_KINDS = dict.fromkeys(KINDS, ("logits", "probabilities", "invariance"))
ADDED = {"labeled": ("invariance", "contrastive"), "unlabeled": ("contrastive", "density")}


def axes_of(kind: str) -> list[Axis]:
    """Return what is tried of a term, one property after the other: most of the two criteria that the paper puts first."""
    axes = [vary("weight", WEIGHTS[kind])]
    if kind in CONSISTENCY:
        return [*axes, vary("schedule", ("up", "down", "early")), rescale(0.5, 2.0)]
    if kind in ("invariance", "group"):
        axes += [vary("layers", ("last", "but_last", "first")), vary("directions", ("fresh", "target", "contrast"))]
        axes += [vary("stop", (True,))] if kind == "invariance" else []
        # All ten directions are dear, and cheapest where few parameters are compared for a short time.
        return [*axes, vary("schedule", ("up", "down", "early")), switch(layers="first", directions="all", schedule="early")]
    axes += [vary("target", (0.02, 0.4))] if kind == "density" else []
    axes += [vary("layers", ("last",))] if kind == "contrastive" else []
    return [*axes, vary("schedule", ("early",))]


def search(start: Setting, axes: Sequence[Axis], judge: Callable[[Setting], float]) -> Setting:
    """Choose the last term of a setting, one property after the other, each time from the best so far."""
    best, best_score = start, -math.inf
    for axis in axes:
        *others, last = best.terms
        for term in axis(last):
            setting = replace(start, terms=(*others, term))
            score = judge(setting)
            best, best_score = (setting, score) if score > best_score else (best, best_score)
    return best


def choose(judge: Callable[[Setting], float], quick: bool) -> dict[str, Setting]:
    """Return the chosen setting of each arm: every kind of term alone, then criteria beside consistency."""
    chosen: dict[str, Setting] = {}
    for images, kinds in (QUICK_KINDS if quick else KINDS).items():
        for kind in kinds:
            axes = [vary("weight", WEIGHTS[kind][:2])] if quick else axes_of(kind)
            chosen[f"{images}: {kind}"] = search(Setting(images, (Term(kind, 0.0),)), axes, judge)
        steady = max(CONSISTENCY, key=lambda kind: judge(chosen[f"{images}: {kind}"]))
        for kind in (kind for kind in ADDED[images] if kind in kinds):
            both = Setting(images, chosen[f"{images}: {steady}"].terms + chosen[f"{images}: {kind}"].terms)
            axes = [rescale(1.0)] if quick else [rescale(1.0, 0.3), vary("schedule", ("early",))]
            chosen[f"{images}: {steady} + {kind}"] = search(both, axes, judge)
    return chosen


def relative_cost(setting: Setting, data: Data, steps: int, repeats: int) -> float:
    """Return the median time of a step over that of augmentation alone, taken in turns; over the schedule, times `longer`."""
    if not setting.terms:
        return float(setting.longer)
    plain, other = (Training(some, data, 0, LABELED, steps) for some in (Setting(), setting))
    shares: dict[tuple[Term, ...], list[float]] = {}
    for step in range(steps):
        active = tuple(term for term in setting.terms if term.factor(step / steps) > 0)
        shares.setdefault(active, []).append(step / steps)
    cost = 0.0
    for places in shares.values():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3 + repeats):
            for training, taken in zip((plain, other), times, strict=True):
                start = time.perf_counter()
                training.step(places[0])
                taken.append(time.perf_counter() - start)
        cost += len(places) / steps * statistics.median(times[1][3:]) / statistics.median(times[0][3:])
    return cost * setting.longer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard deviation and standard error, rounded."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    found = {"mean": statistics.fmean(values), "sd": deviation, "se": deviation / math.sqrt(len(values))}
    return {name: round(value, 4) for name, value in found.items()}


def compare(arms: dict[str, list[dict[str, float]]], references: dict[str, list[str]]) -> dict[str, Any]:
    """Return accuracies by arm, and differences to reference arms seed by seed: "clean", "transformed" and their mean."""
    kinds: dict[str, Callable[[dict[str, float]], float]] = {
        "clean": lambda row: row["clean"],
        "transformed": lambda row: row["transformed"],
        "mean": lambda row: (row["clean"] + row["transformed"]) / 2,
    }
    found: dict[str, Any] = {}
    for name, rows in arms.items():
        found[name] = {kind: spread([of(row) for row in rows]) for kind, of in kinds.items()}
        for reference in references.get(name, []):
            pairs = list(zip(rows, arms[reference], strict=True))
            found[name][f"minus {reference}"] = {kind: spread([of(a) - of(b) for a, b in pairs]) for kind, of in kinds.items()}
    return found


def write_table(
    study: Study, labels: str, found: dict[str, Any], settings: dict[str, Setting], costs: dict[str, float]
) -> None:
    rows = []
    for name, row in found.items():
        differences = [value["mean"] for key, value in row.items() if key.startswith("minus")]
        cells = [f"{row[kind]['mean']:.3f} ± {row[kind]['se']:.3f}" for kind in ("clean", "transformed")]
        cells += [f"{value['mean']:+.3f} ± {value['se']:.3f}" for value in differences] + [""] * (2 - len(differences))
        rows.append([name, str(settings[name]).partition(": ")[2], *cells, costs[name]])
    head = ("arm", "chosen setting", "clean", "transformed", "− augmentation", "− best consistency", "cost")
    study.table(f"{labels} labels", head, rows, [*[""] * 6, ".1f"], f"{labels} labeled images", left=2)


def plot(found: dict[str, Any], costs: dict[str, float], labels: int, seeds: int) -> Figure:
    """Draw the accuracies of all arms with their standard errors, beside the cost of a step."""
    names, title = list(found), "Few labels: what each criterion gains, and what it costs"
    reading = (
        f"Test accuracy with {labels} labeled images, mean and standard error of {seeds} seeds: clean images (filled) and "
        "affinely transformed ones (open). Dashed: augmentation alone. Blue: a criterion on gradients; brown: consistency "
        "of outputs alone. Right: time of training in units of that of augmentation alone."
    )
    size = (4.0, 0.24 * len(names))
    with panels(title, reading, columns=2, size=size, gap=(0.4, 0.0), margin=(2.9, 0.3)) as (figure, ((left, right),)):
        for place, name in enumerate(names):
            plain = not any(kind in name for kind in WEIGHTS if kind not in CONSISTENCY)
            color = style.INK if "augmentation" in name else style.ACTIVATION if plain else style.GRADIENT
            for kind, face in (("clean", color), ("transformed", style.PAPER)):
                mean, error = found[name][kind]["mean"], found[name][kind]["se"]
                left.errorbar(mean, place, xerr=error, fmt="o", color=color, mfc=face, markersize=5, linewidth=1.2)
            right.barh(place, costs[name], color=color, height=0.6)
            right.text(costs[name] * 1.05, place, f"{costs[name]:.1f}", va="center", fontsize=7.5, color=style.MUTED)
        for kind in ("clean", "transformed"):
            left.axvline(found[names[0]][kind]["mean"], color=style.MUTED, linewidth=0.9, linestyle="--", zorder=0)
        left.set_yticks(range(len(names)), names)
        right.set(yticks=[], xlim=(0, 1.15 * max(costs.values())))
        for axes, label in ((left, "test accuracy"), (right, "time of training")):
            axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
    return figure


def shortlist(chosen: dict[str, Setting], judge: Callable[[Setting], float]) -> dict[str, list[str]]:
    """Return, for each kind of images, the arms that are best on the validation split: consistency, criterion, both."""

    def kind(name: str) -> int:
        return 2 if " + " in name else int(name.split(": ")[1] not in CONSISTENCY)

    best: dict[str, list[str]] = {}
    for images in KINDS:
        groups = [[name for name in chosen if name.startswith(images) and kind(name) == group] for group in range(3)]
        best[images] = [max(names, key=lambda name: judge(chosen[name])) for names in groups if names]
    return best


def references_of(settings: dict[str, Setting], best: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return which arms each arm is compared with: augmentation alone, and the best consistency on the same images."""
    found = {}
    for name, setting in settings.items():
        others = ["augmentation", best[setting.images][0]] if setting.terms else ["augmentation"]
        found[name] = [other for other in others if other != name]
    return found


@script(SIZES, threads=2)
def main(study: Study) -> dict[str, Any]:
    options, quick = study.options, study.options.quick
    data = Data.load(options.data_dir, *((500, 500) if quick else (2000, 10_000)))
    seeds = range(options.seed, options.seed + options.seeds)
    search_seeds = range(options.seed + 1000, options.seed + 1000 + options.search_seeds)
    tried: dict[Setting, float] = {}

    def runs(setting: Setting, split: str, per_class: int, steps: int, seeds: Iterable[int]) -> list[dict[str, float]]:
        key = {"split": split, "setting": str(setting), "labels": per_class * CLASSES, "steps": steps}
        return study.log.by_seed(key, seeds, partial(measure, setting, data, split, per_class, steps))

    def judge(setting: Setting) -> float:
        if setting not in tried:
            rows = runs(setting, "validation", LABELED, options.search_steps, search_seeds)
            tried[setting] = float(np.mean([[row["clean"], row["transformed"]] for row in rows]))
        return tried[setting]

    chosen = choose(judge, quick)
    best = shortlist(chosen, judge)
    longer, steady = f"augmentation, {LONGER} × steps", best["labeled"][0]
    worth = judge(Setting()) + (WORTH if not quick else -1)
    kept = {name: setting for name, setting in chosen.items() if judge(setting) >= worth}
    settings = {"augmentation": Setting(), longer: Setting(longer=LONGER), **kept}
    settings[f"{steady}, 2 × steps"] = replace(chosen[steady], longer=2)
    references = references_of(settings, best)
    few = ["augmentation", longer, *(name for names in best.values() for name in (names[0], names[-1]))]
    found = {}
    for per_class, names in ((LABELED, list(settings)), (FEWER, few)):
        arms = {name: runs(settings[name], "test", per_class, options.steps, seeds) for name in names}
        found[str(per_class * CLASSES)] = compare(arms, references)
    repeats = 3 if quick else 80
    costs = {name: round(relative_cost(some, data, options.steps, repeats), 2) for name, some in settings.items()}
    for labels, rows in found.items():
        write_table(study, labels, rows, settings, costs)
    full = found[str(LABELED * CLASSES)]
    study.figure(plot(full, costs, LABELED * CLASSES, options.seeds))
    for name in chosen.keys() - kept.keys():
        print(f"Not carried on: {name} ({chosen[name]}), {judge(chosen[name]) - judge(Setting()):+.3f} on the validation split")
    return {
        "accuracy": full,
        "accuracy_with_fewer": found[str(FEWER * CLASSES)],
        "best_on_validation": best,
        "setting": {name: str(setting) for name, setting in (chosen | settings).items()},
        "validation": {name: round(judge(some), 4) for name, some in {"augmentation": Setting(), **chosen}.items()},
        "cost": costs,
        "tried": len(tried),
        "options": study.sizes,
        "seconds": study.seconds,
    }


if __name__ == "__main__":
    main()
