"""Align the differences of embeddings of different classes, as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_positive_int, check_seed, expected
from lightning_netsim.functional._precision import unit_rows
from lightning_netsim.functional.difference_alignment import DIFFERENCES, NORMS, difference_alignment_loss
from lightning_netsim.losses.criterion import AbstractEmbeddingLoss


class DifferenceAlignmentLoss(AbstractEmbeddingLoss):
    """Compute how much the differences between samples of different classes vary: the mean of G(m_k − m_l) over k < l.

    Which differences m_1, ..., m_H are compared is drawn anew at each call: those along a random chain b_0, b_1, ..., b_n of
    the samples, as in the paper, or of all pairs of samples. Pairs of one class are left out.

    Args:
        difference: "distance" ‖z − z'‖ (the default), or the vectors of the paper, "signed" z − z' or "abs" |z − z'|. Vectors
            of three or more classes are equal only where their embeddings are: with a weight that matters, the vector forms
            pull a network towards one point.
        norm: G: "l2", "l1" or "squared_l2". Of distances, the first two are the same; their pull does not fade as the
            distances come close to each other, and can outweigh a weak loss. "squared_l2" fades.
        pairs: "chain" compares neighbors along a random order of the batch, H ≤ B − 1; "all" all pairs, H ≤ B(B − 1)/2.
        num_differences: compare this many of them, at least 2: the length n of the chain, or so many pairs of different
            classes at random, an unbiased estimate of the mean over all. None for all of them.
        normalize: divide embeddings by their length first, as most losses on embeddings do, so that distances lie in [0, 2]
            and the term cannot shrink with the embeddings.
        seed: of the draws, which begin anew where a run is resumed.

    Raises:
        NetsimError: for a value out of range; later, for embeddings that are not finite, or labels of another length.

    Source: Chen et al., Robust Similarity Learning with Difference Alignment Regularization, ICLR 2024; the distance form is
    this package's.

    Example:
        >>> corners, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
        >>> DifferenceAlignmentLoss()(corners, labels).item()
        0.0
        >>> DifferenceAlignmentLoss(pairs="all", normalize=False)(2 * torch.eye(2), torch.tensor([0, 1])).item()
        0.0
    """

    def __init__(
        self,
        difference: str = "distance",
        norm: str = "squared_l2",
        pairs: str = "chain",
        num_differences: int | None = None,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.difference = check_choice("difference", difference, DIFFERENCES)
        self.norm = check_choice("norm", norm, NORMS)
        self.pairs = check_choice("pairs", pairs, ("chain", "all"))
        if num_differences is not None and check_positive_int("num_differences", num_differences) < 2:
            raise expected("num_differences", "at least 2, as differences are compared with each other", "1")
        self.num_differences = num_differences
        self.normalize = normalize
        self.seed = check_seed("seed", seed)
        self._generator = torch.Generator().manual_seed(seed)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.normalize:
            embeddings = unit_rows(embeddings)
        pairs = self._draw(labels)
        return difference_alignment_loss(embeddings, labels, pairs, self.difference, self.norm)

    def _draw(self, labels: Tensor) -> Tensor | None:
        """Return the samples of each pair, shape (2, n); None for all pairs."""
        size = len(labels)
        if self.pairs == "chain":
            order = torch.randperm(size, generator=self._generator)
            links = torch.stack([order[:-1], order[1:]])
            return links[:, : self.num_differences]
        if self.num_differences is None:
            return None
        sizes = torch.unique(labels, return_counts=True)[1]
        possible = (size * size - int(sizes.square().sum())) // 2
        if possible <= self.num_differences:
            return None
        return self._some_pairs(labels.cpu(), self.num_differences, possible)

    def _some_pairs(self, labels: Tensor, number: int, possible: int) -> Tensor:
        """Return so many of the possible pairs of different classes, each with the same chance, shape (2, n)."""
        size = len(labels)
        if possible < 8 * number or possible < size * size // 8:  # Rejection would be slow.
            first, second = torch.triu_indices(size, size, offset=1)
            pairs = torch.stack([first, second])[:, labels[first] != labels[second]]
            return pairs[:, torch.randperm(possible, generator=self._generator)[:number]]
        codes = torch.zeros(0, dtype=torch.int64)
        while len(codes) < number:
            drawn = torch.randint(size, (2, 4 * number), generator=self._generator)
            first, second = drawn[:, labels[drawn[0]] != labels[drawn[1]]].sort(0).values
            codes = torch.unique(torch.cat([codes, first * size + second]))
        codes = codes[torch.randperm(len(codes), generator=self._generator)[:number]]
        return torch.stack([codes // size, codes % size])
