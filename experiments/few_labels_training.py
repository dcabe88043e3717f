"""What `few_labels.py` trains: a small network on few labels, with one term or another beside the cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_netsim import JacobianOperator
from lightning_netsim.demos import MNISTDataModule
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


class SmallNetwork(nn.Sequential):
    """Map images of 28×28 pixels to ten logits, by two convolutions with stride 2 and two linear layers: 27,690 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, kernel_size=3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


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


def draw_maps(count: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Return random affine maps, shape (count, 2, 3): 30° of rotation, 15° of shear, 20 % of scale, 10 % of shift at most."""
    angle, shear, size, right, down = (2 * torch.rand(5, count, generator=generator) - 1) * scale
    angle, shear, size = angle * math.pi / 6, shear * math.pi / 12, 1 + 0.2 * size
    cos, sin, slant = angle.cos() * size, angle.sin() * size, shear.tan()
    rows = torch.stack([cos, slant * cos - sin, 0.2 * right, sin, slant * sin + cos, 0.2 * down], 1)
    return rows.view(count, 2, 3)


def transform(images: Tensor, maps: Tensor) -> Tensor:
    """Apply a map to each image, shape (B, 1, 28, 28), bilinearly, with black around it."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class Data:
    """Training, validation and test images with labels; the last two with their transformed selves."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def load(cls, data_dir: str, validation: int, test: int) -> Data:
        train, held_out = (part.tensors for part in MNISTDataModule(data_dir).load_sets())
        judged = []
        for seed, (images, labels) in enumerate(((train[0][POOL:][:validation], train[1][POOL:][:validation]), held_out)):
            images, labels = images[:test], labels[:test]
            maps = draw_maps(len(images), torch.Generator().manual_seed(10**6 + seed))
            judged.append((images, labels, transform(images, maps)))
        return cls((train[0][:POOL], train[1][:POOL]), *judged)

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
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

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


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified as their label says."""
    predicted = torch.cat([network(some).argmax(1) for some in images.split(500)])
    return float((predicted == labels).double().mean())
