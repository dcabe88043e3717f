"""Keep the differences between classes consistent while a LightningModule trains."""

from __future__ import annotations

from typing import Any

from lightning_netsim.estimators import PseudoLabels
from lightning_netsim.losses import DifferenceAlignmentLoss
from lightning_netsim.mixins.layers import EmbeddingCriterion, EmbeddingRegularizer, embedding_criterion
from lightning_netsim.mixins.regularized import RegularizedModule
from lightning_netsim.mixins.schedule import ScheduleLike


class DifferenceAlignmentMixin(RegularizedModule):
    """Add weight · difference alignment to the loss of a LightningModule: all classes are to be equally far from each other.

    ``class Mine(DifferenceAlignmentMixin, MyModule)`` adds the regularizer of DASL to whatever loss ``MyModule`` trains
    embeddings by; with `ContrastiveMixin` to its right, to that. Embeddings are what `alignment_layer` puts out during the
    training step. The unweighted term is logged as ``netsim/alignment_loss``. In several processes each compares its own
    samples: the mean over the processes estimates the same.

    Args:
        args: passed on.
        alignment_criterion: what is minimized: `DifferenceAlignmentLoss` (by default of distances), or a function of
            (embeddings, labels).
        alignment_weight: λ: a number, points [step, weight] joined by straight lines, or a function of the step.
        alignment_layer: the name of the module that puts out the embeddings; None for what the LightningModule returns.
        alignment_labels: pairs of one class are left out: "batch" takes the labels of the batch, a negative one for none;
            "instance" a class for each sample, for all its views; a number k takes k clusters of the embeddings of the epoch
            before, by k-means, and "instance" in the first epoch.
        alignment_every_n_steps: add the term to every n-th optimizer step only.
        kwargs: passed on.

    Raises:
        ValueError: for a value out of range, a mixin to the right of the module in the bases, manual optimization; before
            training begins for an unknown layer; at the first step for missing labels.

    Source: Chen et al., Robust Similarity Learning with Difference Alignment Regularization, ICLR 2024.

    Example:
        >>> import torch
        >>> from lightning_netsim.demos import ImageClassifier
        >>> class Aligned(DifferenceAlignmentMixin, ImageClassifier):
        ...     "Classes are to be equally far from each other in the hidden layer."
        >>> model = Aligned(network="digits", alignment_layer="network.6", alignment_weight=0.1)
        >>> loss = model.training_step((torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])), 0)
    """

    is_mixin = True

    def __init__(
        self,
        *args: Any,
        alignment_criterion: EmbeddingCriterion | None = None,
        alignment_weight: ScheduleLike = 1.0,
        alignment_layer: str | None = None,
        alignment_labels: int | str = "batch",
        alignment_every_n_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._keep_hyperparameters(alignment_criterion=alignment_criterion, alignment_weight=alignment_weight)
        self.alignment_criterion = embedding_criterion("alignment_criterion", alignment_criterion) or DifferenceAlignmentLoss()
        regularizer = EmbeddingRegularizer(
            "alignment", alignment_weight, alignment_every_n_steps, layer=alignment_layer, labels=alignment_labels
        )
        self._regularizers.append(regularizer)
        if isinstance(alignment_labels, int):
            self.alignment_clusters = PseudoLabels(alignment_labels)
