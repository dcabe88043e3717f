"""Learn embeddings by what belongs together while a LightningModule trains."""

from __future__ import annotations

from typing import Any

from lightning_netsim._checks import check_positive_number
from lightning_netsim.estimators import PseudoLabels
from lightning_netsim.losses import ContrastiveLoss
from lightning_netsim.mixins.layers import EmbeddingCriterion, EmbeddingRegularizer, embedding_criterion
from lightning_netsim.mixins.regularized import RegularizedModule
from lightning_netsim.mixins.schedule import ScheduleLike


class ContrastiveMixin(RegularizedModule):
    """Add weight · criterion of embeddings to the loss of a LightningModule: samples of one class together, others apart.

    ``class Mine(ContrastiveMixin, MyModule)`` adds the term to the training step of ``MyModule``. Embeddings are what
    `contrastive_layer` puts out during that step. A module without a training step is trained by the term alone: it is run on
    the inputs of each batch, and needs `forward` and `configure_optimizers`. The unweighted term is logged as
    ``netsim/contrastive_loss``.

    Several views of each sample: let a batch be ([first views, second views], labels), or the step run the module on each of
    them or on all, one after the other. Rows are read as all first views, then all second views.

    Parameters of the criterion, such as proxies, are parameters of the module: they are saved, moved and synchronized with
    it, and added to the first group of its optimizer unless `configure_optimizers` has put them somewhere.

    Args:
        args: passed on.
        contrastive_criterion: what is minimized: `ContrastiveLoss` (the default), those of pytorch-metric-learning by
            `MetricLearningLoss`, or a function of (embeddings, labels).
        contrastive_weight: the weight: a number, points [step, weight] joined by straight lines, or a function of the step.
        contrastive_layer: the name of the module that puts out the embeddings, for example "network.8"; None for what the
            LightningModule returns.
        contrastive_labels: "batch" for the labels of the batch, a negative one for none; "instance" for a class of its own
            for each sample, of which there have to be several views; or a number k, for k clusters of the embeddings of the
            epoch before, by k-means, and "instance" in the first epoch, or nothing for a loss with proxies.
        contrastive_every_n_steps: add the term to every n-th optimizer step only.
        contrastive_learning_rate: of the criterion's own parameters; None for the rate of the first group of the optimizer.
        contrastive_across_processes: whether samples are compared with those of all processes, as one process with the joint
            batch would; else each process compares its own, and the terms are averaged.
        kwargs: passed on.

    Raises:
        ValueError: for a value out of range, a mixin to the right of the module in the bases, manual optimization; before
            training begins for an unknown layer; at the first step for missing labels or views.

    Source: Lepetit, Deep Learning and Computer Vision (lecture, 2021), embeddings and siamese networks; Chen et al., ICML 2020
    (two views).

    Example:
        >>> import torch
        >>> from lightning_netsim.demos import ImageClassifier
        >>> class Embedded(ContrastiveMixin, ImageClassifier):
        ...     "The hidden layer is to keep the classes apart too."
        >>> model = Embedded(network="digits", contrastive_layer="network.6", contrastive_weight=0.1)
        >>> loss = model.training_step((torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])), 0)
    """

    is_mixin = True
    trains_alone = True

    def __init__(
        self,
        *args: Any,
        contrastive_criterion: EmbeddingCriterion | None = None,
        contrastive_weight: ScheduleLike = 1.0,
        contrastive_layer: str | None = None,
        contrastive_labels: int | str = "batch",
        contrastive_every_n_steps: int = 1,
        contrastive_learning_rate: float | None = None,
        contrastive_across_processes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._keep_hyperparameters(contrastive_criterion=contrastive_criterion, contrastive_weight=contrastive_weight)
        if contrastive_learning_rate is not None:
            check_positive_number("contrastive_learning_rate", contrastive_learning_rate)
        self.contrastive_criterion = embedding_criterion("contrastive_criterion", contrastive_criterion) or ContrastiveLoss()
        regularizer = EmbeddingRegularizer(
            "contrastive",
            contrastive_weight,
            contrastive_every_n_steps,
            layer=contrastive_layer,
            labels=contrastive_labels,
            across_processes=contrastive_across_processes,
            needs_pairs=True,
            learning_rate=contrastive_learning_rate,
        )
        self._regularizers.append(regularizer)
        if isinstance(contrastive_labels, int):
            self.contrastive_clusters = PseudoLabels(contrastive_labels)
