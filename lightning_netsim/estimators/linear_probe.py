"""Judge embeddings by how well a linear classifier reads the classes from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import check_positive_int, check_positive_number, expected
from lightning_netsim.estimators.labeled_embeddings import AbstractEmbeddingMetric, LabeledEmbeddings


class LinearProbe(AbstractEmbeddingMetric):
    """Compute the accuracy of multinomial logistic regression on frozen embeddings.

    It is trained on the reference samples (``update(..., reference=True)``) where there are some, else by cross-validation,
    every class spread evenly over the folds. Embeddings are normalized to length 1, then each coordinate to variance 1.

    Args:
        folds: of the cross-validation, at least 2.
        weight_decay: λ of the penalty λ/2 ‖W‖² beside the mean cross-entropy, > 0.
        max_iterations: of L-BFGS.

    Raises:
        NetsimError: for a value out of range; later, where shapes do not fit.

    Source: the linear evaluation of Chen et al., A Simple Framework for Contrastive Learning, ICML 2020.

    Example:
        >>> probe = LinearProbe(folds=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> probe(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(1.)
    """

    def __init__(self, folds: int = 5, weight_decay: float = 1e-3, max_iterations: int = 100) -> None:
        super().__init__()
        if check_positive_int("folds", folds) < 2:
            raise expected("folds", "at least 2", "1")
        self.folds = folds
        self.weight_decay = check_positive_number("weight_decay", weight_decay)
        self.max_iterations = check_positive_int("max_iterations", max_iterations)

    def compute(self) -> Tensor:
        """Return the accuracy, a scalar in [0, 1]; NaN without samples to train on and to judge."""
        queries, references = self.queries(), self.references()
        if not len(queries) or len(queries) + len(references) < 2:
            return torch.tensor(math.nan)
        if len(references):
            return self._correct(references, queries).float().mean()
        folds = min(self.folds, len(queries))
        # The samples of a class take turns; one class goes on where the other has stopped.
        fold = torch.empty_like(queries.labels)
        fold[queries.labels.argsort(stable=True)] = torch.arange(len(queries)) % folds
        parts = [(queries[fold != each], queries[fold == each]) for each in range(folds)]
        return torch.cat([self._correct(train, judged) for train, judged in parts]).float().mean()

    def _correct(self, train: LabeledEmbeddings, judged: LabeledEmbeddings) -> Tensor:
        """Return which samples a classifier trained on others gets right, shape (n,), bool."""
        mean, deviation = train.vectors.mean(0), train.vectors.std(0, correction=0).clamp_min(1e-6)
        classes, targets = torch.unique(train.labels, return_inverse=True)
        weights = self._fit((train.vectors - mean) / deviation, targets, len(classes))
        logits = F.linear((judged.vectors - mean) / deviation, weights[:, :-1], weights[:, -1])
        correct: Tensor = classes[logits.argmax(1)] == judged.labels
        return correct

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _fit(self, inputs: Tensor, targets: Tensor, num_classes: int) -> Tensor:
        """Return weights and, in the last column, biases, shape (C, h + 1)."""
        inputs, targets = inputs.clone(), targets.clone()  # They may come from inference mode.
        weights = torch.zeros(num_classes, inputs.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=self.max_iterations, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = F.cross_entropy(F.linear(inputs, weights[:, :-1], weights[:, -1]), targets)
            penalty = weights[:, :-1].square().sum() * self.weight_decay / 2
            (fit + penalty).backward()  # type: ignore[no-untyped-call]
            return fit + penalty

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weights.detach()
