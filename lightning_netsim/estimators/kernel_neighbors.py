"""Find the nearest neighbors of every sample under the kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import check_neighbors_fit, check_positive_int
from lightning_netsim.features import AbstractFeatureBatch
from lightning_netsim.index import NeighborIndex
from lightning_netsim.jacobian import SketchProjection
from lightning_netsim.results import KernelNeighborsResult


class KernelNeighbors:
    """Find the k reference samples of highest similarity k(x, x_j) for every query, with faiss over the features.

    `update` with every batch of the reference set, then `query` with every batch of the query set, then `compute`.

    Args:
        k: the number of neighbors, the sample itself not counted.
        index_factory: a faiss `index_factory` string; "Flat" searches all.
        projection: sketch the features to fewer numbers; None keeps all d·P of them.

    Example:
        >>> from lightning_netsim.features import DenseFeatureBatch
        >>> features, ids = DenseFeatureBatch(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])), torch.arange(3)
        >>> neighbors = KernelNeighbors(k=1)
        >>> _ = neighbors.update(features, ids)
        >>> neighbors.query(features, ids).index.flatten()
        tensor([2, 2, 1])
    """

    def __init__(self, k: int = 10, index_factory: str = "Flat", projection: SketchProjection | None = None) -> None:
        self.k = check_positive_int("k", k)
        self.index_factory = index_factory
        self.projection = projection
        self.reset()

    @property
    def is_exact(self) -> bool:
        """Return whether the table is that of the exact kernel, up to rounding."""
        return self.index_factory == "Flat" and (self.projection is None or self.projection.is_exact)

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._index: NeighborIndex | None = None
        self._num_seen = 0
        self._answers: list[KernelNeighborsResult] = []

    def update(self, reference: AbstractFeatureBatch, ids: Tensor) -> Tensor:
        """Add a batch of the reference set.

        Args:
            reference: the features of B samples.
            ids: shape (B,), int64, not used before.

        Returns:
            the vectors that were indexed, one row for each valid sample.
        """
        vectors = self._vectors(reference)
        if self._index is None:
            self._index = NeighborIndex(vectors.shape[1], self.index_factory)
        self._num_seen += len(ids)
        if len(vectors):
            self._index.add(vectors, ids[reference.valid.cpu()])
        return vectors

    def query(self, queries: AbstractFeatureBatch, exclude: Tensor | None = None) -> KernelNeighborsResult:
        """Find the neighbors of a batch of the query set.

        Args:
            queries: the features of B samples.
            exclude: shape (B,), the ids of the queries themselves where they are in the reference set.

        Returns:
            the neighbors, shape (B, k); -1 and NaN for samples that were left out, and where so many of the reference set were
            that fewer than k remain.
        """
        valid = queries.valid.cpu()
        similarity = torch.full((len(valid), self.k), torch.nan)
        index = torch.full((len(valid), self.k), -1)
        check_neighbors_fit(self.k, self._num_seen, exclude is not None)
        usable = 0 if self._index is None else len(self._index) - int(exclude is not None)
        k = min(self.k, usable)
        if self._index is not None and k > 0 and bool(valid.any()):
            vectors = self._vectors(queries)
            found = self._index.search(vectors, k, None if exclude is None else exclude[valid])
            similarity[valid, :k], index[valid, :k] = found.similarity, found.index
        answer = KernelNeighborsResult(similarity, index, 1.0 if self.is_exact else None)
        self._answers.append(answer)
        return answer

    def _vectors(self, features: AbstractFeatureBatch) -> Tensor:
        """Return what is indexed: unit vectors, of sketches too.

        The cosine of two sketches stays within [-1, 1], and at similarity k its variance is about (1 − k²)²/K, that of their
        inner product (1 + k²)/K: for near neighbors, which are what is sought, many times as large.
        """
        return F.normalize(features.vectors(self.projection).float().cpu(), dim=1)

    def compute(self, recall: float | None = None) -> KernelNeighborsResult:
        """Return the neighbors of all queries so far, in the order in which they were asked.

        Args:
            recall: what an audit measured; an exact table has 1.0 without one.
        """
        similarity = torch.cat([answer.similarity for answer in self._answers])
        index = torch.cat([answer.index for answer in self._answers])
        return KernelNeighborsResult(similarity, index, 1.0 if self.is_exact else recall)
