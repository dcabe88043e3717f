"""Find the nearest neighbors of every sample among feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_netsim._checks import check_neighbors_fit, check_positive_int
from lightning_netsim.estimators.index import NeighborIndex
from lightning_netsim.estimators.neighbor_table import AllPairs
from lightning_netsim.functional.results import KernelNeighborsResult
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch


class KernelNeighbors:
    """Find the k reference samples of highest similarity for every query, by a search over their vectors.

    `update` with every batch of the reference set, then `query` with every batch of the query set, then `compute`. Vectors on
    a CPU are searched by faiss; a flat search over vectors on another device stays there.

    Args:
        k: the number of neighbors, the sample itself not counted.
        index_factory: a faiss `index_factory` string; "Flat" searches all.
        settle_ties: whether ties break by the lower id; not worth its cost for candidates.

    Example:
        >>> from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
        >>> features, ids = DenseFeatureBatch(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])), torch.arange(3)
        >>> neighbors = KernelNeighbors(k=1)
        >>> _ = neighbors.update(features, ids)
        >>> neighbors.query(features, ids).index.flatten()
        tensor([2, 2, 1])
    """

    def __init__(self, k: int = 10, index_factory: str = "Flat", settle_ties: bool = True) -> None:
        self.k = check_positive_int("k", k)
        self.settle_ties = settle_ties
        self.index_factory = index_factory
        self.reset()

    @property
    def is_exact(self) -> bool:
        """Return whether the table is that of all inner products, up to rounding."""
        return self.index_factory == "Flat"

    def reset(self) -> None:
        """Forget the reference set and all queries."""
        self._index: NeighborIndex | _FlatSearch | None = None
        self._num_seen = 0
        self._answers: list[KernelNeighborsResult] = []

    def update(self, reference: AbstractFeatureBatch, ids: Tensor) -> Tensor:
        """Add a batch of the reference set.

        Args:
            reference: the features of B samples.
            ids: shape (B,), int64, not used before.

        Returns:
            the vectors that were added, one row for each valid sample.
        """
        vectors = reference.vectors().float()
        self._num_seen += len(ids)
        if self._index is None:
            stays = vectors.device.type != "cpu" and self.index_factory == "Flat"
            self._index = _FlatSearch() if stays else NeighborIndex(vectors.shape[1], self.index_factory)
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
        k = min(self.k, len(self._index) - int(exclude is not None)) if self._index is not None else 0
        if self._index is not None and k > 0 and bool(valid.any()):
            own = None if exclude is None else exclude[valid]
            found = self._index.search(queries.vectors().float(), k, own, self.settle_ties)
            similarity[valid, :k], index[valid, :k] = found.similarity, found.index
        answer = KernelNeighborsResult(similarity, index, 1.0 if self.is_exact else None)
        self._answers.append(answer)
        return answer

    def compute(self, recall: float | None = None) -> KernelNeighborsResult:
        """Return the neighbors of all queries so far, in the order in which they were asked.

        Args:
            recall: what an audit measured; an exact table has 1.0 without one.
        """
        similarity = torch.cat([torch.zeros(0, self.k), *(answer.similarity for answer in self._answers)])
        index = torch.cat([torch.zeros(0, self.k, dtype=torch.int64), *(answer.index for answer in self._answers)])
        return KernelNeighborsResult(similarity, index, 1.0 if self.is_exact else recall)


class _FlatSearch:
    """Search vectors where they are, on a device that faiss does not reach: tiles of inner products."""

    _BLOCK = 4096

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self._held)

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        self._held.append((vectors, ids))

    def search(self, vectors: Tensor, k: int, exclude: Tensor | None, settle_ties: bool) -> KernelNeighborsResult:
        self._held = [(torch.cat([held for held, _ in self._held]), torch.cat([ids for _, ids in self._held]))]
        (held, ids), pairs = self._held[0], AllPairs(len(vectors), k, device=vectors.device)
        for some, own in zip(torch.split(held, self._BLOCK), torch.split(ids, self._BLOCK), strict=True):
            pairs.offer(vectors @ some.mT, own, exclude=exclude)
        return pairs.neighbors()
