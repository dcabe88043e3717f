"""State over batches of embeddings with their labels, as a torchmetrics metric."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_netsim._checks import check_labels, check_same_size, check_tensor, expected
from lightning_netsim.functional._precision import unit_rows


@dataclass(frozen=True, eq=False)
class LabeledEmbeddings:
    """Embeddings and the class of each.

    Attributes:
        vectors: shape (n, h), float32 on the CPU, of length 1; zero where an embedding was zero or not finite.
        labels: shape (n,), int64, at least 0.
    """

    vectors: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> LabeledEmbeddings:
        """Return some of the samples."""
        return LabeledEmbeddings(self.vectors[chosen], self.labels[chosen])


class AbstractEmbeddingMetric(Metric, ABC):
    """A metric of embeddings and labels: update with batches, compute from all of them, over all processes.

    Every process needs a sample of its own.
    """

    full_state_update = False
    embeddings: list[Tensor]
    labels: list[Tensor]
    reference_embeddings: list[Tensor]
    reference_labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("embeddings", "labels", "reference_embeddings", "reference_labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor, reference: bool = False) -> None:
        """Add a batch.

        Args:
            embeddings: shape (B, h), kept where they are; h is the same in all batches.
            labels: shape (B,), the class of each sample; one with a negative label is left out.
            reference: whether these are the samples to learn from or to search in. Where there are none, the samples serve
                each other.

        Raises:
            NetsimError: shapes do not fit.
        """
        embeddings = check_tensor("embeddings", embeddings, 2, like="(B, h)").detach().float()
        labels = check_labels("labels", labels, len(embeddings)).to(embeddings.device)
        known = labels >= 0
        if not embeddings.shape[1]:
            raise expected("embeddings", "at least one number for each sample", "a width of 0")
        for before in (*self.embeddings[-1:], *self.reference_embeddings[-1:]):
            check_same_size("embeddings", embeddings, "earlier embeddings", before, dim=1)
        held = ("reference_embeddings", "reference_labels") if reference else ("embeddings", "labels")
        for name, values in zip(held, (embeddings[known], labels[known].long()), strict=True):
            getattr(self, name).append(values)

    def queries(self) -> LabeledEmbeddings:
        """Return the samples that are judged."""
        return _joined(self.embeddings, self.labels)

    def references(self) -> LabeledEmbeddings:
        """Return the samples to learn from or to search in; none where the samples serve each other."""
        return _joined(self.reference_embeddings, self.reference_labels)


def _joined(embeddings: list[Tensor] | Tensor, labels: list[Tensor] | Tensor) -> LabeledEmbeddings:
    if not len(embeddings):
        return LabeledEmbeddings(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    vectors = dim_zero_cat(embeddings).cpu()
    finite = torch.isfinite(vectors).all(1, keepdim=True)
    return LabeledEmbeddings(unit_rows(vectors.where(finite, 0.0)), dim_zero_cat(labels).cpu())
