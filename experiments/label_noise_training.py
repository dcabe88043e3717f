"""Networks that were trained on wrong labels, and who finds these: what `label_noise.py` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.few_labels_training import SmallNetwork
from lightning_netsim import SimilarityAnalysis, analyze
from lightning_netsim.demos import DigitsDataModule, DigitsNetwork, MNISTDataModule
from lightning_netsim.functional import label_quality, label_votes

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
        module = DigitsDataModule(seed=seed) if name == "digits" else MNISTDataModule(data_dir)
        (images, labels), held_out = (part.tensors for part in module.load_sets())
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
                optimizer.zero_grad()
                F.cross_entropy(network(images[batch]), labels[batch]).backward()
                optimizer.step()
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
