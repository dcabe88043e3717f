"""Classify small gray-level images: two convolutional networks and the LightningModule that trains either."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_netsim._checks import check_choice, check_positive_number
from lightning_netsim.mixins import SimilarityMixin

ImageBatch = tuple[Tensor, Tensor]
"""Images, shape (B, 1, H, W) in [0, 1], and labels, shape (B,), int64."""


class DigitsNetwork(nn.Sequential):
    """Map images of 8×8 pixels to ten logits, by two convolutions and two linear layers with 38,282 parameters.

    Args:
        num_outputs: the width of the last layer, where it is not ten logits.

    Example:
        >>> import torch
        >>> network = DigitsNetwork()
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_outputs: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, num_outputs),
        )


class MNISTNetwork(nn.Sequential):
    """Map images of 28×28 pixels to ten logits, by the network of 317,069 parameters of the MNIST experiment.

    Two convolutions 5×5 without padding (32 and 64 channels), each followed by a PReLU and an average pool of 2, then linear
    layers 1024-256-10 with a PReLU between them. Charpiat et al., NeurIPS 2019, section 4.

    Args:
        num_outputs: the width of the last layer, where it is not ten logits.

    Example:
        >>> sum(parameter.numel() for parameter in MNISTNetwork().parameters())
        317069
    """

    def __init__(self, num_outputs: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 32, kernel_size=5),
            nn.PReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5),
            nn.PReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 256),
            nn.PReLU(),
            nn.Linear(256, num_outputs),
        )


NETWORKS: dict[str, type[nn.Module]] = {"digits": DigitsNetwork, "mnist": MNISTNetwork}


class ImageClassifier(LightningModule):
    """Train a small network on ten classes of images by cross-entropy; `forward` returns logits, shape (B, 10).

    Args:
        network: "digits" for images of 8×8 pixels (`DigitsNetwork`), "mnist" for 28×28 (`MNISTNetwork`).
        learning_rate: step size of Adam, > 0.

    Example:
        >>> import torch
        >>> model = ImageClassifier(network="mnist")
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, network: str = "digits", learning_rate: float = 1e-3) -> None:
        super().__init__()
        check_choice("network", network, NETWORKS)
        self.learning_rate = check_positive_number("learning_rate", learning_rate)
        self.save_hyperparameters()
        self.network = NETWORKS[network]()
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`, shape (B, 10)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch and log it as `train_loss`."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: ImageBatch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_acc", accuracy, prog_bar=True)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the probability of each class, shape (B, 10)."""
        probabilities: Tensor = self(batch[0]).softmax(dim=-1)
        return probabilities

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over every parameter."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class SimilarityClassifier(SimilarityMixin, ImageClassifier):
    """Train the same network while a criterion tells it which images are to be the same to it.

    This is all that it takes: see `SimilarityMixin` for its arguments, `ImageClassifier` for the others.

    Example:
        >>> model = SimilarityClassifier(network="digits", similarity_weight=0.1)
        >>> model.similarity_criterion
        GroupSimilarityLoss()
    """
