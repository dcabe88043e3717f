"""Judge embeddings by retrieval and clustering, also of classes that training has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from lightning_netsim._checks import check_positive_int, expected
from lightning_netsim.estimators.labeled_embeddings import AbstractEmbeddingMetric, LabeledEmbeddings
from lightning_netsim.functional.retrieval import mean_average_precision_at_r, neighbor_vote, recall_at_k
from lightning_netsim.index import NeighborIndex, find_clusters


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
        map_at_r: whether to compute MAP@R, for which as many neighbors are searched as the largest class has samples.
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
        self.seed = seed

    def compute(self) -> dict[str, Tensor]:
        """Return each figure by its name, a scalar in [0, 1]; NaN where there is nothing to find."""
        queries, references = _renumbered(self.queries(), self.references())
        own = not len(references)
        searched = queries if own else references
        largest = int(searched.labels.bincount().max()) - own if len(searched) else 0
        wanted = max([*self.recall_at, self.num_neighbors, largest if self.map_at_r else 1])
        available = len(searched) - own
        if len(queries) and available > 0:
            similarity, labels = _neighbors(queries, searched, own, min(wanted, available))
        else:
            similarity, labels = torch.zeros(len(queries), 1), torch.full((len(queries), 1), -1)
        figures = self._retrieval(queries, searched, own, similarity, labels)
        if self.nmi:
            figures["nmi"] = _clustering(queries, self.seed)
        return figures

    def _retrieval(
        self, queries: LabeledEmbeddings, searched: LabeledEmbeddings, own: bool, similarity: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        matches = labels == queries.labels.unsqueeze(1)
        figures = {f"recall@{k}": recall_at_k(matches, min(k, matches.shape[1])) for k in self.recall_at}
        if self.map_at_r:
            sizes = searched.labels.bincount(minlength=1 + int(queries.labels.max()) if len(queries) else 0)
            num_relevant = (sizes[queries.labels] - int(own)).clamp_min(0)
            figures["map@r"] = mean_average_precision_at_r(matches, num_relevant)
        voters = slice(None, self.num_neighbors)
        predicted = neighbor_vote(similarity[:, voters], labels[:, voters])
        figures["knn_accuracy"] = (predicted == queries.labels).float().mean()
        return figures


def _renumbered(*samples: LabeledEmbeddings) -> list[LabeledEmbeddings]:
    """Return sets of samples with their classes numbered from 0 on, without gaps."""
    labels = torch.unique(torch.cat([some.labels for some in samples]), return_inverse=True)[1]
    parts = labels.split([len(some) for some in samples])
    return [LabeledEmbeddings(some.vectors, part) for some, part in zip(samples, parts, strict=True)]


def _neighbors(queries: LabeledEmbeddings, searched: LabeledEmbeddings, own: bool, k: int) -> tuple[Tensor, Tensor]:
    """Return the similarities and labels of the k nearest, shape (Q, k) each; NaN and -1 where there is none."""
    found = searched.vectors.any(1).nonzero().squeeze(1)
    similarity = torch.full((len(queries), k), math.nan)
    labels = torch.full((len(queries), k), -1)
    k = min(k, len(found) - own)
    if k > 0:
        index = NeighborIndex(searched.vectors.shape[1])
        index.add(searched.vectors[found], found)
        exclude = torch.arange(len(queries)) if own else None
        result = index.search(queries.vectors, k, exclude, settle_ties=False)  # With k in the hundreds, rounding makes many.
        similarity[:, :k] = result.similarity
        labels[:, :k] = searched.labels[result.index].where(result.index >= 0, -1)
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
