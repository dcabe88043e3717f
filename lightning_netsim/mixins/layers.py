"""Terms of what a layer puts out while the training step runs: rows of embeddings with their labels, or of features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_netsim._checks import check_labels, check_layer, expected
from lightning_netsim.data.batches import find_outputs, find_views, split_batch
from lightning_netsim.data.labels import class_numbers
from lightning_netsim.data.trees import batch_size
from lightning_netsim.estimators import PseudoLabels
from lightning_netsim.functional._precision import unit_rows
from lightning_netsim.losses import AbstractEmbeddingLoss, AbstractSimilarityLoss, MetricLearningLoss
from lightning_netsim.mixins.regularized import AbstractRegularizer, RegularizedModule, Term, made_criterion
from lightning_netsim.mixins.schedule import ScheduleLike

#: What a criterion of embeddings is: (embeddings, labels) in, a scalar out.
EmbeddingCriterion = AbstractEmbeddingLoss | Callable[..., Any]


class AbstractLayerRegularizer(AbstractRegularizer):
    """A term of what a layer puts out during the training step, by the `<name>_criterion` that the module has at the time.

    Args:
        name: the prefix of its settings.
        weight: of the term.
        every_n_steps: how often it is added.
        layer: the module whose output is taken; None for what the LightningModule returns.
    """

    def __init__(self, name: str, weight: ScheduleLike, every_n_steps: int, layer: str | None) -> None:
        super().__init__(name, weight, every_n_steps)
        if layer is not None and not isinstance(layer, str):
            raise expected(f"{name}_layer", "the name of a module", repr(layer))
        self._layer = layer

    def prepare(self, module: LightningModule) -> None:
        self._source(module)

    @contextmanager
    def watch(self, module: RegularizedModule, batch: Any, batch_idx: int) -> Iterator[Term]:
        def term() -> Tensor:
            found: Any = self.term(module, batch, seen)
            if not isinstance(found, Tensor) or found.ndim:
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise expected(f"{self.name}_criterion", "one that returns a scalar", got)
            return found

        with self.capturing(module, lambda: module._is_watched) as seen:
            yield term

    @contextmanager
    def capturing(self, module: LightningModule, is_wanted: Callable[[], bool]) -> Iterator[list[Tensor]]:
        """Collect the rows of each call of the layer inside the block, where they are wanted."""
        seen: list[Tensor] = []

        def hook(part: nn.Module, args: Any, output: Any) -> None:
            # A pass without a graph, as of a teacher, is not what is trained.
            if is_wanted() and torch.is_grad_enabled():
                if isinstance(output, Tensor):
                    rows = output.flatten(1) if output.ndim > 1 else output.unsqueeze(-1)
                else:
                    rows = find_outputs(output, f"Name the layer that puts out one tensor by `{self.name}_layer=`.")
                seen.append(rows.clone())  # What follows may change the output in place.

        handle = self._source(module).register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    @abstractmethod
    def term(self, module: RegularizedModule, batch: Any, seen: list[Tensor]) -> Tensor:
        """Return the term, a scalar, of the rows of each call of the layer."""

    def joined(self, seen: list[Tensor]) -> Tensor:
        """Return the rows of all calls, of the first call first."""
        if not seen:
            where = "the LightningModule itself" if self._layer is None else repr(self._layer)
            remedy = f"Name a layer by `{self.name}_layer=`; calls without gradients, and inside compiled code, are not seen."
            raise expected(f"{self.name}_layer", "a module that the training step calls", f"{where}, which it does not", remedy)
        if len({rows.shape[1] for rows in seen}) > 1:
            got = f"widths {', '.join(str(rows.shape[1]) for rows in seen)}"
            raise expected(f"{self.name}_layer", "a module that puts out rows of one width", got)
        return torch.cat(seen)

    def _source(self, module: LightningModule) -> nn.Module:
        """Return the module whose output is taken."""
        if self._layer is None:
            return module
        parts: dict[str, nn.Module] = dict(module.named_modules())
        return parts[check_layer(f"{self.name}_layer", self._layer, parts)]


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
                options = f"or set `{self.name}_labels` to 'instance' or a number of clusters."
                raise expected("labels", "the class of each sample", got, f"Give the batch as (inputs, labels), {options}")
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
        has_proxies = getattr(self.criterion(module), "num_classes", None) is not None
        by_instance = not has_proxies and (num_views > 1 or not self._needs_pairs)
        if clusters.centers is None and by_instance:
            return instances
        if clusters.centers is None and not self._has_said_so:
            self._has_said_so = True
            rank_zero_info(f"The first epoch only collects embeddings to be clustered: netsim/{self.name}_loss is 0.")
        return clusters.assign(means)


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
