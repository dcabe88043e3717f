"""Judge embeddings by retrieval and clustering, also of classes that training has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from lightning_netsim._checks import check_positive_int, check_seed, expected
from lightning_netsim.estimators.index import NeighborIndex, find_clusters
from lightning_netsim.estimators.labeled_embeddings import AbstractEmbeddingMetric, LabeledEmbeddings
from lightning_netsim.functional.retrieval import mean_average_precision_at_r, neighbor_vote, recall_at_k

# Neighbors that are held at a time: with all samples of large classes, those of all queries would not fit into memory.
_BLOCK_ELEMENTS = 2**22


class EmbeddingMetrics(AbstractEmbeddingMetric):
    """Compute Recall@k, MAP@R, k-NN accuracy and NMI of embeddings, by cosine similarity and exact search.

    A torchmetrics metric: `update` it in ``validation_step``; in ``on_validation_epoch_end`` log what `compute` returns,
    ``self.log_dict(self.metrics.compute())``, and `reset` it. Each sample is looked up among all others, or among the reference
    samples where there are some (``update(..., reference=True)``). No class has to be known to the network.

    - ``recall@k``: the share of samples with one of their own class among the k nearest.
    - ``map@r``: mean average precision at R, the number of other samples of the class.
    - ``knn_accuracy``: of the vote of the nearest neighbors, weighted by exp(similarity / 0.07).
    - ``nmi``: normalized mutual information (arithmetic mean) of classes and k-means clusters, as many as there are classes.

    A sample whose embedding is zero or not finite finds nothing and is not found: it counts as a failure. So does one that is
    alone in its class, but for MAP@R, which leaves it out. Where fewer than k samples can be found, Recall@k is of all. Samples
    that a distributed sampler repeats would find themselves: give such a Trainer ``use_distributed_sampler=False``.

    Args:
        recall_at: the k of Recall@k.
        num_neighbors: how many neighbors vote; fewer where there are fewer.
        map_at_r: whether to compute MAP@R, for which as many neighbors are searched as the largest class has samples: of
            20,000 samples of ten classes that takes 9 s on two cores, all the rest 1 s.
        nmi: whether to cluster.
        seed: of the clustering.

    Raises:
        NetsimError: for a value out of range; later, where shapes do not fit.

    Source: Song et al., CVPR 2016 (Recall@k, NMI); Musgrave et al., ECCV 2020 (MAP@R); Wu et al., CVPR 2018 (k-NN accuracy).

    Example:
        >>> metrics = EmbeddingMetrics(recall_at=(1,))
        >>> metrics.update(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> {name: value.item() for name, value in metrics.compute().items()}
        {'recall@1': 1.0, 'map@r': 1.0, 'knn_accuracy': 1.0, 'nmi': 1.0}
    """

    def __init__(
        self,
        recall_at: Sequence[int] = (1, 2, 4, 8),
        num_neighbors: int = 20,
        map_at_r: bool = True,
        nmi: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(recall_at, Sequence):
            raise expected("recall_at", "a list of numbers of neighbors", repr(recall_at))
        self.recall_at = [check_positive_int("recall_at", k) for k in recall_at]
        self.num_neighbors = check_positive_int("num_neighbors", num_neighbors)
        self.map_at_r = map_at_r
        self.nmi = nmi
        self.seed = check_seed("seed", seed)

    def compute(self) -> dict[str, Tensor]:
        """Return each figure by its name, a scalar in [0, 1]; NaN where there is nothing to find."""
        queries, references = self.queries(), self.references()
        # Classes are numbered from 0 on, without gaps.
        numbers = torch.unique(torch.cat([queries.labels, references.labels]), return_inverse=True)[1]
        truth = numbers[: len(queries)]
        queries, references = replace(queries, labels=truth), replace(references, labels=numbers[len(queries) :])
        search = _Search(queries, references)
        shown = max(1, min(max([*self.recall_at, self.num_neighbors]), search.available))
        relevant = search.num_relevant if self.map_at_r else torch.zeros_like(truth)
        wanted = max(shown, int(relevant.max()) if len(relevant) else 0)
        nearest, precision = [], truth.new_zeros((), dtype=torch.float64)
        for rows in torch.split(torch.arange(len(truth)), max(1, _BLOCK_ELEMENTS // wanted)):
            similarity, labels = search.neighbors(rows, wanted)
            matches = labels == truth[rows].unsqueeze(1)
            nearest.append((similarity[:, :shown], labels[:, :shown], matches[:, :shown]))
            found = mean_average_precision_at_r(matches, relevant[rows])
            precision += found.nan_to_num() * (relevant[rows] > 0).sum()
        if not nearest:
            nearest = [(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool))]
        similarity, labels, matches = (torch.cat(parts) for parts in zip(*nearest, strict=True))
        figures = {f"recall@{k}": recall_at_k(matches, min(k, shown)) for k in self.recall_at}
        if self.map_at_r:
            figures["map@r"] = (precision / (relevant > 0).sum()).float()
        voters = slice(None, self.num_neighbors)
        figures["knn_accuracy"] = (neighbor_vote(similarity[:, voters], labels[:, voters]) == truth).float().mean()
        if self.nmi:
            figures["nmi"] = _clustering(queries, self.seed)
        return figures


class _Search:
    """The neighbors of samples among all others, or among reference samples where there are some.

    Attributes:
        available: how many samples each query can find.
        num_relevant: how many of them are of its class, shape (Q,).
    """

    def __init__(self, queries: LabeledEmbeddings, references: LabeledEmbeddings) -> None:
        self._own = not len(references)
        self._queries, self._searched = queries, queries if self._own else references
        self.available = len(self._searched) - self._own
        sizes = self._searched.labels.bincount(minlength=1 + int(queries.labels.max()) if len(queries) else 0)
        self.num_relevant = (sizes[queries.labels] - int(self._own)).clamp_min(0)
        self._found = self._searched.vectors.any(1).nonzero().squeeze(1)
        self._index: NeighborIndex | None = None
        if len(self._found):
            self._index = NeighborIndex(self._searched.vectors.shape[1])
            self._index.add(self._searched.vectors[self._found], self._found)

    def neighbors(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the similarities and labels of the k nearest of some queries, shape (B, k); NaN and -1 where there is none."""
        similarity, labels = torch.full((len(rows), k), math.nan), torch.full((len(rows), k), -1)
        k = min(k, len(self._found) - self._own)
        if self._index is not None and k > 0:
            # Ties are not settled: with k in the hundreds, rounding makes many.
            result = self._index.search(self._queries.vectors[rows], k, rows if self._own else None, settle_ties=False)
            similarity[:, :k] = result.similarity
            labels[:, :k] = self._searched.labels[result.index].where(result.index >= 0, -1)
        return similarity, labels


def _clustering(samples: LabeledEmbeddings, seed: int) -> Tensor:
    """Return the normalized mutual information of classes and clusters."""
    num_classes = len(torch.unique(samples.labels))
    if num_classes == 0:
        return torch.tensor(math.nan)
    usable = samples.vectors.any(1)
    clusters = torch.full_like(samples.labels, -1)  # Those without a direction stay together.
    if bool(usable.any()):
        vectors = samples.vectors[usable]
        centers = find_clusters(vectors, min(num_classes, len(vectors)), seed, num_starts=3)
        clusters[usable] = (vectors @ centers.mT).argmax(1)
    # Said, or torch warns about the table of counts.
    with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
        return normalized_mutual_info_score(clusters, samples.labels, average_method="arithmetic")
