"""Plant wrong labels, look for them by the gradient kernel, by activations and by cleanlab, and train again without them.

A small network is trained on labels of which 20 or 40 % are wrong, on scikit-learn's digits and on 3,000 images of MNIST. Its
kernel neighbors (`analyze`, then `find_issues`), its k nearest penultimate activations, and cleanlab on its probabilities each
rank the labels, out of sample in three folds; the first two also in sample, by one network that has learned the errors too.
Judged by the area under the ROC curve (AUROC) and by average precision; then as many labels as are wrong, those ranked worst,
are left out or replaced, and a new network is judged by its accuracy on test images. k, and cleanlab's score, are those with
the best mean AUROC on data drawn and spoiled by other seeds.

    python experiments/label_noise.py --data-dir DIRECTORY [--quick] [--out DIRECTORY]

Beside the tables it writes a figure, every run (`detection.csv`, `accuracy.csv`) and the networks. Runs that stand in these
files already are not repeated; take rows out, or delete the directory, to repeat them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import RunLog, Size, Study, mean_of, script
from lab.data import read_digits, read_mnist
from lab.figures import panels
from lab.networks import SmallNetwork
from lab.training import take_step
from lightning_netsim import SimilarityAnalysis, analyze, denoise_labels
from lightning_netsim.demos import DigitsNetwork
from lightning_netsim.functional import label_quality, label_votes
from lightning_netsim.report import style

SIZES = {
    "size": Size(3000, 200, "training images at most (of the digits there are 1,078)"),
    "seeds": Size(range(5), range(1), "of the cases that are reported"),
    "choose_seeds": Size((1000, 1001), (1000,), "of those that k and cleanlab's score are chosen by"),
}
CLASSES = 10
FOLDS = 3
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
NETWORKS: dict[str, type[nn.Module]] = {"digits": DigitsNetwork, "mnist": SmallNetwork}
# The share of labels that are wrong, and whether all of a class go to the same other one.
NOISE = {"symmetric_20": (0.2, False), "symmetric_40": (0.4, False), "class_dependent_20": (0.2, True)}


@dataclass(frozen=True)
class Data:
    """Training images with their true labels, and test images with theirs."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, name: str, data_dir: str, size: int, seed: int) -> Data:
        """Draw at most `size` training images by the seed: of the digits 60 %, of MNIST from all 60,000."""
        (images, labels), held_out = read_digits(0.4, seed) if name == "digits" else read_mnist(data_dir)
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size]
        return cls(images[drawn], labels[drawn], *held_out)


def plant(labels: Tensor, noise: str, seed: int) -> Tensor:
    """Return the labels with a share of them wrong: any other class, or for class-dependent noise the next digit."""
    share, dependent = NOISE[noise]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    step = torch.randint(1, CLASSES, wrong.shape, generator=generator)
    given = labels.clone()
    given[wrong] = (labels[wrong] + (1 if dependent else step)) % CLASSES
    return given


def train(name: str, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train a new network by Adam; its first weights and the order of images depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH_SIZE):
                take_step(optimizer, F.cross_entropy(network(images[batch]), labels[batch]))
    return network.eval()


@torch.no_grad()
def apply(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of a network, shape (N, D)."""
    return torch.cat([network(part) for part in images.split(1000)])


def accuracy(network: nn.Module, data: Data) -> float:
    """Return the share of test images that are given their true label."""
    return float((apply(network, data.test_images).argmax(1) == data.test_labels).double().mean())


@dataclass(frozen=True)
class Findings:
    """What a method says of every training image.

    Attributes:
        score: shape (N,), lower is worse.
        suggestion: shape (N,), the label that it would give.
        flagged: shape (N,), which labels it calls wrong, where it has a threshold.
    """

    score: Tensor
    suggestion: Tensor
    flagged: Tensor | None = None


Method = Callable[["Case"], Findings]
Ask = Callable[[nn.Module, Tensor, Tensor | None], Findings]


class Case:
    """One data set with planted errors, and the networks that were trained on it, each when it is first asked for."""

    def __init__(self, name: str, data: Data, noise: str, seed: int, epochs: int, out: Path) -> None:
        self.name, self.data, self.seed, self.epochs = name, data, seed, epochs
        self.out = out / "networks" / f"{name} {noise}, {len(data.labels)} images, {epochs} epochs, seed {seed}"
        self.given = plant(data.labels, noise, seed)
        self.wrong = self.given != data.labels
        order = torch.randperm(len(self.given), generator=torch.Generator().manual_seed(seed))
        self._answers: dict[Method, Findings] = {}
        self.fold = torch.empty_like(order).scatter(0, order, torch.arange(len(order)) % FOLDS)

    def learn(self, labels: Tensor, kept: Tensor) -> nn.Module:
        """Return a new network that was trained on the images `kept`, with these labels."""
        return train(self.name, self.data.images[kept], labels[kept], self.epochs, self.seed)

    def _kept(self, name: str, kept: Tensor) -> nn.Module:
        """Return the network that was trained on these images with the labels given, from its file if there is one."""
        path = self.out / f"{name}.pt"
        if path.is_file():
            network = NETWORKS[self.name]().eval()
            network.load_state_dict(torch.load(path, weights_only=True))
            return network
        network = self.learn(self.given, kept)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
        return network

    @cached_property
    def network(self) -> nn.Module:
        """Return the network that was trained on all images and all errors."""
        return self._kept("all", torch.ones_like(self.wrong))

    @cached_property
    def networks(self) -> list[nn.Module]:
        """Return for each fold the network that has not seen it."""
        return [self._kept(f"fold {fold}", self.fold != fold) for fold in range(FOLDS)]

    @cached_property
    def probabilities(self) -> Tensor:
        """Return the out-of-sample probability of each class, shape (N, D)."""
        found = torch.empty(len(self.given), CLASSES, dtype=torch.float64)
        for fold, network in enumerate(self.networks):
            found[self.fold == fold] = apply(network, self.data.images[self.fold == fold]).double().softmax(1)
        return found

    def by_fold(self, ask: Ask) -> Findings:
        """Ask of each fold the network that has not seen it: `ask(network, fold, all others)`, and join the answers."""
        parts = [ask(network, self.fold == fold, self.fold != fold) for fold, network in enumerate(self.networks)]
        order = torch.cat([(self.fold == fold).nonzero().squeeze(1) for fold in range(FOLDS)]).argsort()
        flagged = [part.flagged for part in parts if part.flagged is not None]
        return Findings(
            torch.cat([part.score for part in parts])[order],
            torch.cat([part.suggestion for part in parts])[order],
            torch.cat(flagged)[order] if flagged else None,
        )

    def in_sample(self, ask: Ask) -> Findings:
        """Ask the network that was trained on all images of these same images."""
        return ask(self.network, torch.ones_like(self.wrong), None)

    def ask(self, method: Method) -> Findings:
        """Return what a method finds; it is asked once."""
        if method not in self._answers:
            self._answers[method] = method(self)
        return self._answers[method]

    def loader(self, chosen: Tensor) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of images with the labels that were given."""
        return DataLoader(TensorDataset(self.data.images[chosen], self.given[chosen]), batch_size=250)


def kernel(case: Case, k: int) -> Ask:
    """Return who asks `find_issues`, on the neighbors under the gradient kernel."""

    def ask(network: nn.Module, asked: Tensor, others: Tensor | None) -> Findings:
        reference = None if others is None else case.loader(others)
        analysis = analyze(network, case.loader(asked), reference, k=k, compare_activations=False, progress=False)
        return read_issues(analysis)

    return ask


def read_issues(analysis: SimilarityAnalysis) -> Findings:
    """Return the label issues of an analysis."""
    table = analysis.find_issues(["label"]).table
    columns = (table[name].to_numpy() for name in ("label_score", "suggested_label", "is_label_issue"))
    return Findings(*map(torch.tensor, columns))


def activations(case: Case, k: int, as_kernel: bool = False) -> Ask:
    """Return who asks the k nearest neighbors, by the angle of the penultimate activations: the share of the given label.

    `as_kernel` counts their votes, and that of the network, as `find_issues` does those of the kernel's neighbors.
    """

    def ask(network: nn.Module, asked: Tensor, others: Tensor | None) -> Findings:
        features = nn.Sequential(*list(network.children())[:-1])
        queries = apply(features, case.data.images[asked]).numpy()
        known, given = asked if others is None else others, case.given[asked]
        search = NearestNeighbors(n_neighbors=k, metric="cosine").fit(apply(features, case.data.images[known]).numpy())
        found = torch.from_numpy(search.kneighbors(None if others is None else queries, return_distance=False))
        labels = case.given[known][found]
        if as_kernel:
            largest, classes = apply(network, case.data.images[asked]).softmax(1).topk(2)
            votes = label_votes(labels, CLASSES, classes[:, 0], largest[:, 0] - largest[:, 1])
            return Findings(label_quality(votes, given), votes.argmax(1))
        votes = F.one_hot(labels, CLASSES).double().mean(1)
        return Findings(votes.gather(1, given.unsqueeze(1)).squeeze(1), votes.argmax(1))

    return ask


def quality(case: Case, method: str, adjusted: bool) -> Findings:
    """Return cleanlab's label quality scores of the out-of-sample probabilities."""
    given, probabilities = case.given.numpy(), case.probabilities.numpy()
    score = get_label_quality_scores(given, probabilities, method=method, adjust_pred_probs=adjusted)
    return Findings(torch.from_numpy(score), case.probabilities.argmax(1))


def confident(case: Case) -> Findings:
    """Return the issues of cleanlab's confident learning, ranked, before all other labels by the same score."""
    given, probabilities = case.given.numpy(), case.probabilities.numpy()
    issues = find_label_issues(given, probabilities, return_indices_ranked_by="normalized_margin", n_jobs=1)
    rest = quality(case, "normalized_margin", False)
    flagged = torch.zeros_like(case.wrong)
    flagged[torch.from_numpy(np.array(issues, dtype=np.int64))] = True
    return Findings(rest.score - 2.0 * flagged, rest.suggestion, flagged)


def truth(case: Case) -> Findings:
    """Return the planted errors themselves."""
    return Findings(1.0 - case.wrong.double(), case.data.labels, case.wrong)


NEAREST = (5, 10, 20, 30, 50)
QUALITIES = (("self_confidence", False), ("normalized_margin", False), ("normalized_margin", True))
#: What is tried of each kind of method; where there are several, the choice is made by other seeds.
METHODS: dict[str, dict[str, Method]] = {
    "kernel": {"k=30": lambda case: case.by_fold(kernel(case, 30))},
    "kernel, in sample": {"k=30": lambda case: case.in_sample(kernel(case, 30))},
    "activations": {f"k={k}": partial(lambda case, k: case.by_fold(activations(case, k)), k=k) for k in NEAREST},
    "activations, in sample": {f"k={k}": partial(lambda case, k: case.in_sample(activations(case, k)), k=k) for k in NEAREST},
    "activations, kernel's score": {"k=30": lambda case: case.by_fold(activations(case, 30, True))},
    "activations, kernel's score, in sample": {"k=30": lambda case: case.in_sample(activations(case, 30, True))},
    "cleanlab score": {
        f"{method}{', adjusted' * adjusted}": partial(quality, method=method, adjusted=adjusted)
        for method, adjusted in QUALITIES
    },
    "cleanlab issues": {"prune_by_noise_rate": confident},
}

# Scores of a label that were tried before `find_issues` took one, all from the same record of a network.
NEIGHBORS = (10, 20, 30, 50)
DEFAULT = 30


def nearest(analysis: SimilarityAnalysis, k: int) -> SimilarityAnalysis:
    """Return the same analysis with the `k` nearest neighbors of each sample alone."""
    neighbors = analysis.neighbors[analysis.neighbors["rank"] <= k]
    return SimilarityAnalysis(replace(analysis.record, neighbors=neighbors))


def neighbor_labels(analysis: SimilarityAnalysis) -> Tensor:
    """Return the labels of the neighbors, shape (N, k), nearest first."""
    near = analysis.neighbors.sort_values(["index", "rank"])
    if "neighbor_label" in near:
        labels = near["neighbor_label"].to_numpy()
    else:
        labels = analysis.samples.set_index("index")["label"].loc[near["neighbor"]].to_numpy()
    return torch.tensor(labels).view(len(analysis.samples), -1)


def scores(analysis: SimilarityAnalysis) -> dict[str, Tensor]:
    """Return each of the scores that were tried of an analysis with the most neighbors."""
    tables = {k: nearest(analysis, k).find_issues(["label"]).table for k in NEIGHBORS}
    found = {f"`find_issues`, k={k}": torch.tensor(table["label_score"].to_numpy()) for k, table in tables.items()}
    near, given = nearest(analysis, DEFAULT), torch.tensor(analysis.samples["label"].to_numpy())
    labels = neighbor_labels(near)
    found["the same without the network's vote"] = label_quality(label_votes(labels, CLASSES), given)
    same = labels == given.unsqueeze(1)
    similarity = near.neighbors.sort_values(["index", "rank"])["similarity"].to_numpy()
    weight = torch.tensor(np.clip(similarity, 0, None)).view(same.shape)
    found["share of the label"] = same.double().mean(1)
    found["share, weighted by similarity"] = (weight * same).sum(1) / weight.sum(1)
    nearer = analysis.samples["same_class_similarity"] - analysis.samples["other_class_similarity"]
    return found | {"similarity to its class less others": torch.tensor(nearer.to_numpy())}


def try_scores(case: Case) -> dict[tuple[str, str], Findings]:
    """Return what each score finds, by protocol and name."""
    names: list[str] = []

    def ask(network: nn.Module, asked: Tensor, others: Tensor | None) -> Findings:
        reference = None if others is None else case.loader(others)
        settings = {"k": max(NEIGHBORS), "compare_activations": False, "progress": False}
        found = scores(analyze(network, case.loader(asked), reference, **settings))
        smoothed = denoise_labels(network, case.loader(asked), reference, num_probes=1, progress=False)
        probabilities = apply(network, case.data.images[asked]).double().softmax(1)
        confidence = probabilities.gather(1, case.given[asked].unsqueeze(1)).squeeze(1)
        found |= {"probability of the label": confidence}
        found |= {"√(share · probability)": (found["share of the label"] * confidence).sqrt()}
        found |= {"smoothed label, un-normalized kernel": torch.tensor(smoothed.samples["label_share"].to_numpy())}
        names[:] = found
        return Findings(torch.stack([score.double() for score in found.values()], 1), case.given[asked])

    answers = {"out of sample": case.by_fold(ask), "in sample": case.in_sample(ask)}
    return {
        (protocol, name): Findings(answer.score[:, place], answer.suggestion)
        for protocol, answer in answers.items()
        for place, name in enumerate(names)
    }


# Whose worst labels are left out or replaced before a new network is trained.
CLEANED = ("kernel", "kernel, in sample", "activations", "cleanlab score")
TREATMENTS = ("remove", "relabel")
NOTHING, EVERYTHING = "no cleaning", "all errors known"
# Tables of the page: their titles, how figures are written, their factor, and whether with the error over the seeds.
TABLES = {
    "auroc": ("Area under the ROC curve of the planted errors", ".4f"),
    "average_precision": ("Average precision", ".3f"),
    "precision": ("Share of errors among as many labels, those ranked worst", ".3f"),
    "named": ("Share of the errors whose true label is suggested", ".3f"),
    "flagged_precision": ("Precision at the method's own threshold", ".2f"),
    "flagged_recall": ("Recall at the method's own threshold", ".2f"),
    "accuracy": ("Accuracy on test images after cleaning, %", ".1f"),
}
FIRST = {"auroc": "area under the ROC curve", "average_precision": "average precision"}
FLAGS = ("flagged_precision", "flagged_recall")
IN_SAMPLE = ", in sample"
COLORS = {
    "kernel": style.GRADIENT,
    "activations": style.CYCLE[1],
    "activations, kernel's score": style.CYCLE[4],
    "cleanlab score": style.CYCLE[2],
    "cleanlab issues": style.CYCLE[5],
    NOTHING: style.MUTED,
    EVERYTHING: style.INK,
}
TITLES = {"digits": "digits", "mnist": "MNIST"}


def judge(case: Case, findings: Findings) -> dict[str, float]:
    """Return how well the planted errors are found.

    `precision` is that of the worst labels, as many as are wrong; `named` the share of the errors whose true label is
    suggested; `flagged_precision` and `flagged_recall` those of a method's own threshold, NaN where it has none.
    """
    wrong, score = case.wrong.numpy(), findings.score.double().numpy()
    flagged, none = findings.flagged, float("nan")
    hits = none if flagged is None else float((flagged & case.wrong).sum())
    return {
        "auroc": float(roc_auc_score(wrong, -score)),
        "average_precision": float(average_precision_score(wrong, -score)),
        "precision": float(case.wrong[worst(case, findings)].double().mean()),
        "named": float((findings.suggestion == case.data.labels)[case.wrong].double().mean()),
        "flagged_precision": none if flagged is None else hits / max(int(flagged.sum()), 1),
        "flagged_recall": none if flagged is None else hits / int(case.wrong.sum()),
    }


def worst(case: Case, findings: Findings) -> Tensor:
    """Return the places of the labels ranked worst, as many as are wrong."""
    return findings.score.argsort(stable=True)[: int(case.wrong.sum())]


def clean(case: Case, findings: Findings, treatment: str) -> dict[str, float]:
    """Return the accuracy of a new network after the worst labels were left out, or replaced by those suggested."""
    chosen, labels = worst(case, findings), case.given.clone()
    kept = torch.ones_like(case.wrong)
    if treatment == "remove":
        kept[chosen] = False
    else:
        labels[chosen] = findings.suggestion[chosen]
    return {"accuracy": accuracy(case.learn(labels, kept), case.data)}


Place = tuple[str, str, int]
"""A case: data set, noise, seed."""


class Runs:
    """What was found in each case, by method; a case is made, and its networks are trained, only for what is not known yet."""

    def __init__(self, study: Study) -> None:
        self.options = study.options
        self.epochs = {"digits": 2, "mnist": 2} if study.options.quick else {"digits": 40, "mnist": 20}
        self.detection, self.accuracy, self.tried = (
            RunLog(self.options.out / f"{name}.csv") for name in ("detection", "accuracy", "tried")
        )
        self.case = lru_cache(maxsize=1)(self._case)

    def _case(self, name: str, noise: str, seed: int) -> Case:
        data = Data.load(name, self.options.data_dir, self.options.size, seed)
        return Case(name, data, noise, seed, self.epochs[name], self.options.out)

    def detect(self, place: Place, method: str, variant: str) -> dict[str, float]:
        """Return how well a method finds the errors."""

        def make() -> dict[str, float]:
            case = self.case(*place)
            return judge(case, case.ask(METHODS[method][variant]))

        return self.detection.get(self._key(place) | {"method": method, "variant": variant}, make)

    def compare(self, place: Place) -> dict[tuple[str, str], dict[str, float]]:
        """Return how well each of the scores that were tried finds the errors, by protocol and score."""

        def make() -> dict[str, float]:
            case = self.case(*place)
            judged = {names: judge(case, findings) for names, findings in try_scores(case).items()}
            return {" | ".join((*names, figure)): one[figure] for names, one in judged.items() for figure in FIRST}

        found: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in self.tried.get(self._key(place), make).items():
            protocol, score, figure = name.split(" | ")
            found.setdefault((protocol, score), {})[figure] = value
        return found

    def retrain(self, place: Place, method: str, variant: str = "", treatment: str = "") -> float:
        """Return the accuracy after cleaning, or of the network that was trained on all labels as they are."""

        def make() -> dict[str, float]:
            case = self.case(*place)
            if method == NOTHING:
                return {"accuracy": accuracy(case.network, case.data)}
            return clean(case, case.ask(truth if method == EVERYTHING else METHODS[method][variant]), treatment)

        key = self._key(place) | {"method": method, "variant": variant, "treatment": treatment}
        return self.accuracy.get(key, make)["accuracy"]

    def _key(self, place: Place) -> dict[str, Any]:
        name, noise, seed = place
        return {"data": name, "noise": noise, "seed": seed, "size": self.options.size, "epochs": self.epochs[name]}


def choose(runs: Runs, seeds: Sequence[int]) -> dict[str, str]:
    """Choose of each kind of method what has the best mean AUROC in all cases of these seeds."""
    tried: dict[str, dict[str, list[float]]] = {kind: {variant: [] for variant in some} for kind, some in METHODS.items()}
    for place in cases(seeds):
        for kind, variants in tried.items():
            if len(variants) > 1:
                for variant, values in variants.items():
                    values.append(runs.detect(place, kind, variant)["auroc"])
    return {kind: max(some, key=lambda variant: sum(some[variant])) for kind, some in tried.items()}


def compare(runs: Runs, seeds: Sequence[int]) -> dict[str, dict[str, Row]]:
    """Return AUROC and average precision of the scores that were tried, on these seeds, by score, then by data and protocol."""
    found: dict[str, dict[str, Row]] = {figure: {} for figure in FIRST}
    for place in cases(seeds):
        for (protocol, score), judged in runs.compare(place).items():
            for figure, rows in found.items():
                rows.setdefault(score, {}).setdefault((place[0], protocol), []).append(judged[figure])
    return found


def cases(seeds: Sequence[int]) -> list[Place]:
    """Return every data set with every noise, by seed."""
    return [(name, noise, seed) for seed in seeds for name in NETWORKS for noise in NOISE]


Row = dict[tuple[str, str], list[float]]


def collect(runs: Runs, chosen: dict[str, str], seeds: Sequence[int]) -> dict[str, dict[str, Row]]:
    """Return each figure by method, then by data and noise: the values of all seeds."""
    found: dict[str, dict[str, Row]] = {}
    for place in cases(seeds):

        def add(figure: str, method: str, value: float, place: tuple[str, str] = place[:2]) -> None:
            found.setdefault(figure, {}).setdefault(method, {}).setdefault(place, []).append(value)

        for kind, variant in chosen.items():
            for figure, value in runs.detect(place, kind, variant).items():
                add(figure, kind, value)
        add("accuracy", NOTHING, runs.retrain(place, NOTHING))
        for treatment in TREATMENTS:
            for kind in (*CLEANED, EVERYTHING):
                add("accuracy", f"{kind}: {treatment}", runs.retrain(place, kind, chosen.get(kind, ""), treatment))
    return found


def write_table(study: Study, name: str, rows: dict[str, Row]) -> None:
    """Write mean and standard error of each case, and the mean over all cases; no error of thresholds and of what was tried."""
    figure = name.removeprefix("tried, ")
    heading, form = TABLES[figure]
    scale, plain = (100 if figure == "accuracy" else 1), figure in FLAGS or figure != name
    first = FIRST[figure] if figure != name or figure == "auroc" else "method"
    places = list(next(iter(rows.values())))
    cells = []
    for method, row in rows.items():
        means = [scale * mean_of(row[place]) for place in places]
        cells.append([method, *(mean.mean if plain else mean for mean in means), scale * overall(row)])
    head = [first, *(f"{TITLES[data]}, {title(noise)}" for data, noise in places), "mean"]
    study.table(name, head, cells, ["", *[form] * (len(places) + 1)], heading)


def overall(row: Row) -> float:
    """Return the mean over all cases and seeds."""
    return fmean(fmean(values) for values in row.values())


def nested(rows: dict[str, Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the means by data, method and noise, as they stand in the last line."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, row in rows.items():
        for (name, noise), values in row.items():
            found.setdefault(name, {}).setdefault(method, {})[noise] = round(fmean(values), 5)
    return found


def title(noise: str) -> str:
    """Return what a kind of noise is called in tables and figures; what is none is left as it is."""
    kind, _, share = noise.rpartition("_")
    return f"{kind.replace('_', '-')}, {share} %" if kind else share


def draw(auroc: dict[str, Row], after: dict[str, Row]) -> Figure:
    """Draw the AUROC of every method and the accuracy after cleaning, a row of panels for each data set."""
    reading = (
        "Left: how well each method ranks the planted errors. Middle and right: test accuracy of a new network after as many "
        "labels as are wrong, those ranked worst, were left out or replaced. Open circles: by one network, in sample; the "
        "others out of sample. Mean and standard error over the seeds; axes differ."
    )
    names = list(dict.fromkeys(name for name, _ in next(iter(auroc.values()))))
    parts = [("AUROC", auroc, 1)] + [(f"accuracy, {treatment}, %", treated(after, treatment), 100) for treatment in TREATMENTS]
    shown: dict[str, Any] = {}
    shape = {"rows": len(names), "columns": 3, "size": (3.2, 1.95), "gap": (0.55, 0.7), "margin": (0.7, 3.1)}
    with panels("Wrong labels: found, left out, replaced", reading, **shape) as (figure, grid):
        for line, name in zip(grid, names, strict=True):
            for axes, (text, rows, scale) in zip(line, parts, strict=True):
                draw_panel(axes, rows, name, scale)
                axes.set_title(f"{TITLES[name]}: {text}", fontsize=9, loc="left")
                shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        width, height = figure.get_size_inches()
        figure.legend(shown.values(), shown, loc="upper left", bbox_to_anchor=(1 - 3.0 / width, 1 - 1.2 / height))
    return figure


def treated(after: dict[str, Row], treatment: str) -> dict[str, Row]:
    """Return the accuracies of one treatment, and those without any, by method."""
    return {arm.split(": ")[0]: row for arm, row in after.items() if arm == NOTHING or arm.endswith(treatment)}


def draw_panel(axes: Axes, rows: dict[str, Row], name: str, scale: float) -> None:
    """Draw one data set: noise across, methods side by side."""
    for place, (method, row) in enumerate(rows.items()):
        means, errors = zip(*(scale * mean_of(row[name, noise]) for noise in NOISE), strict=True)
        across = [column + 0.72 * (place / max(len(rows) - 1, 1) - 0.5) for column in range(len(NOISE))]
        color = COLORS[method.removesuffix(IN_SAMPLE)]
        inside = style.PAPER if method.endswith(IN_SAMPLE) else color
        axes.errorbar(
            across, means, errors, fmt="o", markersize=5, capsize=2, color=color, markerfacecolor=inside, label=method
        )
    axes.set_xticks(range(len(NOISE)), [title(noise).replace(", ", "\n") for noise in NOISE])
    axes.set_xlim(-0.5, len(NOISE) - 0.5)
    axes.grid(axis="y")


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    runs, options = Runs(study), study.options
    tried, chosen = compare(runs, options.choose_seeds), choose(runs, options.choose_seeds)
    for figure, rows in tried.items():
        write_table(study, f"tried, {figure}", rows)
    found = collect(runs, chosen, options.seeds)
    for figure in TABLES:
        known = {method: row for method, row in found[figure].items() if overall(row) == overall(row)}  # NaN has none
        write_table(study, figure, known)
    study.figure(draw(found["auroc"], found["accuracy"]))
    means = {
        figure: {method: round(overall(row), 5) for method, row in found[figure].items()}
        for figure in ("auroc", "average_precision", "accuracy")
    }
    return {
        "auroc": nested(found["auroc"]),
        "average_precision": nested(found["average_precision"]),
        "accuracy_after": nested(found["accuracy"]),
        "auroc_mean": means["auroc"],
        "average_precision_mean": means["average_precision"],
        "accuracy_after_mean": means["accuracy"],
        "scores_tried": {
            figure: {score: round(overall(row), 5) for score, row in rows.items()} for figure, rows in tried.items()
        },
        "named": nested(found["named"]),
        "threshold": {figure: nested({"kernel": found[figure]["kernel"]}) for figure in FLAGS},
        "chosen": chosen,
        "options": study.sizes | {"epochs": runs.epochs},
    }


if __name__ == "__main__":
    main()
