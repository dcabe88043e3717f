"""What the mixins of embeddings share: find the labels of what a layer puts out in the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import check_labels, expected
from lightning_netsim.data.batches import find_views, split_batch
from lightning_netsim.data.labels import class_numbers
from lightning_netsim.data.trees import batch_size
from lightning_netsim.estimators import PseudoLabels
from lightning_netsim.functional._precision import unit_rows
from lightning_netsim.losses import AbstractEmbeddingLoss, AbstractSimilarityLoss, MetricLearningLoss
from lightning_netsim.mixins.layers import AbstractLayerRegularizer
from lightning_netsim.mixins.regularized import RegularizedModule, made_criterion
from lightning_netsim.mixins.schedule import ScheduleLike

#: What a criterion of embeddings is: (embeddings, labels) in, a scalar out.
EmbeddingCriterion = AbstractEmbeddingLoss | Callable[..., Any]


class EmbeddingRegularizer(AbstractLayerRegularizer):
    """A term of the embeddings of a layer, by the `<name>_criterion` that the module has at the time.

    Args:
        name: the prefix of its settings.
        weight: of the term.
        every_n_steps: how often it is added.
        layer: the module whose output are the embeddings; None for what the LightningModule returns.
        labels: "batch", "instance", or a number of clusters.
        across_processes: whether all processes compare their samples with those of the others.
        needs_pairs: whether the criterion is of no use where no two samples share a label.
        learning_rate: of the criterion's own parameters; None for that of the module.
    """

    def __init__(
        self,
        name: str,
        weight: ScheduleLike,
        every_n_steps: int,
        *,
        layer: str | None,
        labels: int | str,
        across_processes: bool = False,
        needs_pairs: bool = False,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(name, weight, every_n_steps, layer)
        is_number = isinstance(labels, int) and not isinstance(labels, bool) and labels > 1
        if labels not in ("batch", "instance") and not is_number:
            raise expected(f"{name}_labels", "'batch', 'instance', or a number of clusters from 2", repr(labels))
        self.learning_rate = learning_rate
        self._labels = labels
        self._across_processes, self._needs_pairs = across_processes, needs_pairs
        self._has_said_so = False

    def term(self, module: RegularizedModule, batch: Any, seen: list[Tensor]) -> Tensor:
        embeddings = self.joined(seen)
        labels = self._labels_of(module, batch, embeddings)
        if self._across_processes and _world_size(module) > 1:
            embeddings, labels = gathered(module, embeddings), gathered(module, labels)
        term: Tensor = self.criterion(module)(embeddings, labels)
        return term

    def _labels_of(self, module: LightningModule, batch: Any, embeddings: Tensor) -> Tensor:
        """Return the label of each row: views of all samples come one after the other."""
        inputs, given, _ = split_batch(batch)
        views, labels = find_views(inputs), class_numbers(given)
        size = batch_size(views[0] if views else inputs) or (0 if labels is None else len(labels))
        num_views = len(embeddings) // size if size else 0
        if not num_views or len(embeddings) % size:
            got = f"{len(embeddings)} rows from a batch of {size}"
            remedy = f"Name the layer by `{self.name}_layer=` that puts out one row for each sample and view."
            raise expected("embeddings", "one or more rows for each sample", got, remedy)
        if self._labels == "batch":
            if labels is None:
                got = "none" if given is None else f"a {type(given).__name__} without whole numbers"
                remedy = (
                    f"Give the batch as (inputs, labels), or set `{self.name}_labels` to 'instance' or a number of clusters."
                )
                raise expected("labels", "the class of each sample", got, remedy)
            return check_labels("labels", labels, size).to(embeddings.device).repeat(num_views)
        instances = torch.arange(size, device=embeddings.device) * _world_size(module) + module.global_rank
        if self._labels == "instance":
            if self._needs_pairs and num_views == 1:
                remedy = "Let the batch be ([first views, second views], ...), or the step run the module on both."
                raise expected("batch", "several views of each sample", "one", remedy)
            return instances.repeat(num_views)
        return self._clusters_of(module, embeddings, instances, num_views).repeat(num_views)

    def _clusters_of(self, module: LightningModule, embeddings: Tensor, instances: Tensor, num_views: int) -> Tensor:
        """Return the cluster of each sample, by the mean of its views, and keep these to be clustered after the epoch."""
        clusters: PseudoLabels = getattr(module, f"{self.name}_clusters")
        clusters.begin_epoch(module.current_epoch)
        means = unit_rows(embeddings.detach().float()).view(num_views, -1, embeddings.shape[1]).sum(0)
        clusters.update(means)
        # A loss with proxies knows fewer classes than there are samples, and one that needs pairs has none in single views.
        by_instance = getattr(self.criterion(module), "num_classes", None) is None and not (
            self._needs_pairs and num_views == 1
        )
        if clusters.centers is not None or not by_instance:
            if clusters.centers is None and not self._has_said_so:
                self._has_said_so = True
                rank_zero_info(f"The first epoch only collects embeddings to be clustered: netsim/{self.name}_loss is 0.")
            return clusters.assign(means)
        return instances


def _world_size(module: LightningModule) -> int:
    return 1 if module._trainer is None else module.trainer.world_size


def gathered(module: LightningModule, rows: Tensor) -> Tensor:
    """Return the rows of all processes, of the first process first, on the graph.

    A gradient that reaches a row is the sum of what all processes send. As data-parallel training averages gradients over the
    processes, a term that each of them computes of all rows is differentiated as one process with all rows would.
    """
    lengths: Any = module.all_gather(torch.tensor(len(rows), device=rows.device))
    sizes = lengths.tolist()
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)])
    everyone: Any = module.all_gather(padded, sync_grads=rows.requires_grad)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def embedding_criterion(name: str, criterion: EmbeddingCriterion | Mapping[str, Any] | None) -> AbstractEmbeddingLoss | None:
    """Return a criterion of embeddings; a function of (embeddings, labels) becomes one."""
    wanted = "a module of `lightning_netsim.losses` for embeddings, or a function of (embeddings, labels)"
    made = made_criterion(name, criterion, wanted)
    if isinstance(made, AbstractSimilarityLoss):
        raise expected(name, wanted, f"{type(made).__name__}, which is of gradients", "Give it to `SimilarityMixin`.")
    return made if made is None or isinstance(made, AbstractEmbeddingLoss) else MetricLearningLoss(made)
