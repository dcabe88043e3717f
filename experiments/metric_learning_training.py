"""What `metric_learning.py` trains: small convolutional networks that embed images, judged on classes they have not seen."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NPairsLoss
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_netsim._checks import expected
from lightning_netsim.estimators import EmbeddingMetrics
from lightning_netsim.losses import ContrastiveLoss, DifferenceAlignmentLoss, MetricLearningLoss

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

Labeled = tuple[Tensor, Tensor]
"""Images, shape (N, 1, H, W), in [0, 1] with ink = 1, and labels, shape (N,)."""


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
        images, labels, of_alphabet = _read(_archive(data_dir, "images_background.zip"), alphabets)
        others, other_labels, _ = _read(_archive(data_dir, "images_evaluation.zip"), alphabets)
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


def _archive(data_dir: str, name: str) -> Path:
    path = Path(data_dir) / "omniglot" / name
    if not path.is_file():
        remedy = f"Put {name} of https://github.com/brendenlake/omniglot (folder python) there, or give `--data digits`."
        raise expected("--data-dir", f"a directory with omniglot/{name} in it", f"{data_dir!r}", remedy)
    return path


def _read(path: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, shape (N, 1, 28, 28), and the numbers of their characters and alphabets."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        alphabets = sorted({name.split("/")[1] for name in names})[:limit]
        names = [name for name in names if name.split("/")[1] in alphabets]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("L") for name in names]
    # BOX averages over the area of each new pixel, also where the ratio of sizes is no whole number.
    pixels = np.stack([np.asarray(picture.resize((28, 28), Image.Resampling.BOX)) for picture in pictures])
    characters = [name.rsplit("/", 1)[0] for name in names]
    number = {character: place for place, character in enumerate(sorted(set(characters)))}
    labels = torch.tensor([number[character] for character in characters])
    of_alphabet = torch.tensor([alphabets.index(name.split("/")[1]) for name in names])
    return 1 - torch.as_tensor(pixels, dtype=torch.float32).unsqueeze(1) / 255, labels, of_alphabet


class DigitsNetwork(nn.Sequential):
    """Embed images of 8×8 pixels."""

    def __init__(self) -> None:
        convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        super().__init__(*convolutions, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, SIZE))


class OmniglotNetwork(nn.Sequential):
    """Embed images of 28×28 pixels by three convolutions with stride 2 and a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(1024, SIZE))


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
            self.network = DigitsNetwork() if run.data == DIGITS else OmniglotNetwork()
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
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


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
