"""Carry what is learned on MNIST over to images that look different, and have no labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim._checks import check_seed
from lightning_netsim.demos.classifier import ImageClassifier
from lightning_netsim.demos.images import MNISTDataModule
from lightning_netsim.mixins import MMDMixin


class DomainClassifier(MMDMixin, ImageClassifier):
    """Classify images of one domain by their labels, and match the features of another domain to theirs.

    This is all that it takes: see `MMDMixin` and `ImageClassifier` for the arguments.

    Example:
        >>> model = DomainClassifier(network="mnist", mmd_layer="network.8")
        >>> images = torch.rand(4, 1, 28, 28)
        >>> loss = model.training_step({"source": (images, torch.tensor([0, 0, 1, 1])), "target": images}, 0)
    """


class ShiftedMNISTDataModule(MNISTDataModule):
    """Serve two domains: MNIST with labels, and MNIST before cloudy backgrounds, on which training sees no labels.

    Batches of training are ``{"source": (images, labels), "target": (images,)}``: one half of the training images as they are,
    the other half before backgrounds. Validation, test and prediction go over the test images, before backgrounds.

    Args:
        data_dir: the directory that holds, or shall hold, `MNIST/raw`, as torchvision lays it out.
        batch_size: images in a batch, of each domain.
        download: fetch the four files (about 12 MB) if they are missing.
        num_workers: processes that load batches; 0 loads them in the main process.
        seed: of the backgrounds.
    """

    target_set: TensorDataset

    def __init__(
        self, data_dir: str, batch_size: int = 128, download: bool = False, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(data_dir, batch_size, download, num_workers)
        self.seed = check_seed("seed", seed)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Load MNIST and put what belongs to the target before backgrounds."""
        super().setup(stage)
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = self.train_set.tensors
        self.train_set = TensorDataset(images[::2], labels[::2])
        self.target_set = TensorDataset(before_clouds(images[1::2], generator))
        images, labels = self.val_set.tensors
        self.val_set = TensorDataset(before_clouds(images, generator), labels)

    def train_dataloader(self) -> Any:
        """Return one loader for each domain."""
        target: DataLoader[Any] = self._loader(self.target_set, shuffle=True)
        return {"source": super().train_dataloader(), "target": target}


def before_clouds(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return bright strokes on black, (N, 1, H, W) in [0, 1], before backgrounds that vary smoothly within [0, 0.5]."""
    coarse = torch.rand(len(images), 1, 5, 5, generator=generator)
    clouds = F.interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=True).clamp(0, 1)
    return images + 0.5 * clouds * (1 - images)
