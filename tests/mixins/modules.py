"""Small modules that the tests of the mixins extend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim.losses import AbstractSimilarityLoss, GradientBatch
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin, SimilarityMixin

CLASSES, SIZE = 3, 12


class Plain(LightningModule):
    """A classifier of points; what its step does beside the loss is to be kept."""

    def __init__(self, width: int = 5, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(width)] if norm else []
        self.net = nn.Sequential(nn.Linear(4, width), *norms, nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, CLASSES))
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Regularized(SimilarityMixin, Plain):
    """The same, regularized."""


class Embedded(ContrastiveMixin, Plain):
    """The same, its outputs trained as embeddings too."""


class Aligned(DifferenceAlignmentMixin, Plain):
    """The same, the differences of its outputs aligned."""


class Encoder(LightningModule):
    """A module without a training step, whose optimizer knows its network only."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class TrainedEncoder(ContrastiveMixin, Encoder):
    """The same, trained by a loss on its embeddings alone."""


class OutputNorm(AbstractSimilarityLoss):
    """A criterion whose value and gradient are known: the mean squared output."""

    def compute(self, batch: GradientBatch) -> Tensor:
        return batch.outputs.square().mean()


def batch(size: int = SIZE, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % CLASSES


def loader(size: int = SIZE, batch_size: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch(size)), batch_size=batch_size)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **options})


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
