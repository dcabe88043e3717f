"""Embed small gray-level images: the module, and the same trained by losses on its embeddings."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_netsim._checks import check_choice, check_positive_int, check_positive_number
from lightning_netsim.demos.classifier import NETWORKS, ImageBatch
from lightning_netsim.estimators import EmbeddingMetrics
from lightning_netsim.mixins import ContrastiveMixin, DifferenceAlignmentMixin


class EmbeddingModule(LightningModule):
    """Map images to embeddings, and judge them by retrieval; it has no loss of its own, that is for a mixin to bring.

    Args:
        network: "digits" for images of 8×8 pixels, "mnist" for 28×28.
        embedding_dim: h, the width of the embeddings.
        projection_dim: in training, put two layers with this many outputs behind the embeddings, and train their outputs, as
            SimCLR does; None for none. Evaluation sees the embeddings themselves.
        learning_rate: step size of Adam, > 0.

    Example:
        >>> model = EmbeddingModule(embedding_dim=32)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        network: str = "digits",
        embedding_dim: int = 64,
        projection_dim: int | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        check_choice("network", network, NETWORKS)
        check_positive_int("embedding_dim", embedding_dim)
        self.learning_rate = check_positive_number("learning_rate", learning_rate)
        self.save_hyperparameters()
        self.network = NETWORKS[network](embedding_dim)
        self.projection: nn.Module = nn.Identity()
        if projection_dim is not None:
            layers = nn.Linear(embedding_dim, embedding_dim), nn.ReLU(), nn.Linear(embedding_dim, projection_dim)
            self.projection = nn.Sequential(nn.ReLU(), *layers)
        self.val_metrics = EmbeddingMetrics()
        self.test_metrics = EmbeddingMetrics()

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of images, shape (B, h); in training, what the projection makes of them."""
        embeddings: Tensor = self.network(images)
        return self.projection(embeddings) if self.training else embeddings

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the embeddings of a batch."""
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log `val_recall@1`, `val_map@r`, `val_nmi` and the others."""
        self._log("val", self.val_metrics)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the embeddings of a batch."""
        self.test_metrics.update(self(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        """Log `test_recall@1`, `test_map@r`, `test_nmi` and the others."""
        self._log("test", self.test_metrics)

    def _log(self, stage: str, metrics: EmbeddingMetrics) -> None:
        for name, value in metrics.compute().items():
            self.log(f"{stage}_{name}", value, prog_bar=name in ("recall@1", "nmi"))
        metrics.reset()

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the embeddings of a batch, shape (B, h)."""
        embeddings: Tensor = self(batch[0])
        return embeddings

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over every parameter."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class MetricLearner(DifferenceAlignmentMixin, ContrastiveMixin, EmbeddingModule):
    """Train embeddings by a loss on their labels, and keep the differences between classes consistent.

    This is all that it takes: see `ContrastiveMixin`, `DifferenceAlignmentMixin` and `EmbeddingModule` for the arguments.

    Example:
        >>> model = MetricLearner(alignment_weight=0.3)
        >>> loss = model.training_step((torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])), 0)
    """
