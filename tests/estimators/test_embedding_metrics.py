"""Retrieval and clustering of embeddings against loops over queries and against other libraries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators import EmbeddingMetrics
from lightning_netsim.estimators import embedding_metrics as room
from lightning_netsim.estimators.index import find_clusters

SIZES = (1, 2, 3, 5, 9, 20, 1)  # Two classes have a single sample.
RETRIEVAL = ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "knn_accuracy")


def samples(seed: int, sizes: tuple[int, ...] = SIZES, width: int = 6, signal: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return embeddings around one direction for each class, of any length and in random order, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    directions = torch.randn(len(sizes), width, generator=torch.Generator().manual_seed(99))
    embeddings = signal * directions[labels] + torch.randn(len(labels), width, generator=generator)
    embeddings = embeddings * (0.1 + 5 * torch.rand(len(labels), 1, generator=generator))
    order = torch.randperm(len(labels), generator=generator)
    return embeddings[order], labels[order]


def figures(
    embeddings: Tensor, labels: Tensor, reference: tuple[Tensor, Tensor] | None = None, **settings: Any
) -> dict[str, float]:
    metrics = EmbeddingMetrics(**settings)
    metrics.update(embeddings, labels)
    if reference is not None:
        metrics.update(*reference, reference=True)
    return {name: value.item() for name, value in metrics.compute().items()}


def unit(vector: Tensor) -> Tensor | None:
    """Return the vector at length 1 in float64, or None where it has no direction."""
    vector = vector.double()
    return vector / vector.norm() if bool(torch.isfinite(vector).all()) and bool(vector.any()) else None


def slow_retrieval(
    embeddings: Tensor,
    labels: Tensor,
    reference: tuple[Tensor, Tensor] | None = None,
    recall_at: tuple[int, ...] = (1, 2, 4, 8),
    num_neighbors: int = 20,
) -> dict[str, float]:
    """Return the figures by sorting, for each query, all samples that it may find by their cosine."""
    gallery, gallery_labels = (embeddings, labels) if reference is None else reference
    queries, candidates = [unit(row) for row in embeddings], [unit(row) for row in gallery]
    hits: dict[int, list[bool]] = {k: [] for k in recall_at}
    precisions, right = [], []
    for i, query in enumerate(queries):
        label, found, num_relevant = int(labels[i]), [], 0
        for j, candidate in enumerate(candidates):
            if reference is None and i == j:
                continue
            num_relevant += int(gallery_labels[j]) == label
            if query is not None and candidate is not None:
                found.append((float(query @ candidate), int(gallery_labels[j])))
        found.sort(reverse=True)
        for k in recall_at:
            hits[k].append(any(other == label for _, other in found[:k]))
        if num_relevant:
            matches = [other == label for _, other in found]
            precision = [sum(matches[: n + 1]) / (n + 1) for n, match in enumerate(matches[:num_relevant]) if match]
            precisions.append(sum(precision) / num_relevant)
        votes: dict[int, float] = {}
        for cosine, other in found[:num_neighbors]:
            votes[other] = votes.get(other, 0.0) + math.exp(cosine / 0.07)
        right.append(bool(votes) and max(votes, key=lambda each: votes[each]) == label)
    result = {f"recall@{k}": sum(hit) / len(hit) for k, hit in hits.items()}
    result["map@r"] = sum(precisions) / len(precisions)
    return {**result, "knn_accuracy": sum(right) / len(right)}


def check(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6, nan_ok=True)


# Against loops


@pytest.mark.parametrize(("seed", "signal"), [(0, 0.0), (1, 2.0)])
def test_each_sample_is_looked_up_among_all_others(seed: int, signal: float) -> None:
    embeddings, labels = samples(seed, signal=signal)
    found = figures(embeddings, labels)
    assert tuple(found) == (*RETRIEVAL, "nmi")
    assert 0 < found["recall@1"] < 1
    check(found, slow_retrieval(embeddings, labels))


def test_the_number_of_neighbors_that_vote() -> None:
    embeddings, labels = samples(2)
    embeddings = (F.normalize(embeddings, dim=1) + 1).half()  # In a cone, so that the nearest does not outvote the others.
    found = [figures(embeddings, labels, num_neighbors=number) for number in (1, 3, 100)]
    for number, values in zip((1, 3, 100), found, strict=True):
        check(values, slow_retrieval(embeddings, labels, num_neighbors=number))
    assert found[0]["knn_accuracy"] == found[0]["recall@1"]
    assert len({values["knn_accuracy"] for values in found}) == 3


def test_queries_in_a_gallery_may_find_their_own_copy() -> None:
    gallery = samples(3, (4, 6, 1, 12, 3))
    embeddings, labels = samples(4, (3, 2, 5, 1, 2, 4))  # The last class is not in the gallery.
    check(figures(embeddings, labels, gallery), slow_retrieval(embeddings, labels, gallery))
    found = figures(*gallery, gallery)
    check(found, slow_retrieval(*gallery, gallery))
    assert found["recall@1"] == 1 > figures(*gallery)["recall@1"]


def test_embeddings_without_a_direction_find_nothing_and_are_not_found() -> None:
    embeddings, labels = samples(6)
    broken = embeddings.clone()
    broken[3], broken[7, 0], broken[11] = 0, math.nan, math.inf
    broken[20:23] = 0
    found = figures(broken, labels)
    check(found, slow_retrieval(broken, labels))
    assert 0 < found["recall@1"] < figures(embeddings, labels)["recall@1"]
    assert math.isfinite(found["nmi"])
    gallery = samples(7)
    check(figures(broken, labels, gallery), slow_retrieval(broken, labels, gallery))
    check(figures(*gallery, (broken, labels)), slow_retrieval(*gallery, (broken, labels)))


def test_unlabeled_samples_are_left_out() -> None:
    embeddings, labels = samples(8)
    extra = torch.cat([embeddings, samples(9)[0]])  # They would be found if they were kept.
    unlabeled = torch.cat([labels, torch.full((len(labels),), -1)])
    order = torch.randperm(len(extra))
    found = figures(extra[order], unlabeled[order])
    check(found, slow_retrieval(embeddings, labels))
    gallery = samples(10)
    check(figures(*gallery, (extra[order], unlabeled[order])), slow_retrieval(*gallery, (embeddings, labels)))


# Invariance


def test_lengths_and_the_order_of_embeddings_do_not_matter() -> None:
    embeddings, labels = samples(11)
    wanted = {name: value for name, value in figures(embeddings, labels).items() if name != "nmi"}
    length = torch.tensor([1e-30, 1.0, 1e30])[torch.arange(len(labels)) % 3].unsqueeze(1)
    check(figures(embeddings * length, labels), wanted)
    order = torch.randperm(len(labels))
    check(figures(embeddings[order], labels[order]), wanted)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    check(figures(embeddings @ rotation, labels), wanted)
    names = torch.tensor([40, 3, 7, 10**12, 0, 12, 55])  # What the classes are called does not matter either.
    check(figures(embeddings, names[labels]), wanted)


def test_batches_equal_one_update_and_a_reset_forgets() -> None:
    embeddings, labels = samples(12)
    gallery = samples(13)
    metrics = EmbeddingMetrics()
    for reference in (gallery, None):
        for part in zip(embeddings.split(7), labels.split(7), strict=True):
            metrics.update(*part)
        if reference is not None:
            for part in zip(reference[0].split(11), reference[1].split(11), strict=True):
                metrics.update(*part, reference=True)
        found = {name: value.item() for name, value in metrics.compute().items()}
        assert found == figures(embeddings, labels, reference)
        metrics.reset()


# Clusters


def test_mutual_information_is_that_of_the_clusters_found() -> None:
    peer = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    embeddings, labels = samples(20, (30, 10, 25, 2, 40))
    vectors = F.normalize(embeddings, dim=1)
    for seed in (0, 3):
        clusters = (vectors @ find_clusters(vectors, 5, seed, num_starts=3).mT).argmax(1)
        wanted = peer(labels.numpy(), clusters.numpy(), average_method="arithmetic")
        assert 0.1 < wanted < 0.9
        assert figures(embeddings, labels, seed=seed)["nmi"] == pytest.approx(wanted, abs=1e-5)


# Small sets


def test_no_sample_and_no_other_of_a_class() -> None:
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    unlabeled = torch.ones(4, 3), torch.full((4,), -1)
    for held in (empty, unlabeled):
        assert all(math.isnan(value) for value in figures(*held).values())
        assert all(math.isnan(value) for value in figures(*held, samples(21, width=3)).values())
    embeddings, labels = samples(22)
    assert figures(embeddings, labels, (torch.zeros(0, 6), empty[1])) == figures(embeddings, labels)
    alone = figures(torch.randn(2, 3), torch.tensor([4, 1]))  # Neither has anything to find.
    assert math.isnan(alone.pop("map@r"))
    assert {value for name, value in alone.items() if name != "nmi"} == {0.0}


# Settings


def test_what_is_not_asked_for_is_not_computed() -> None:
    embeddings, labels = samples(23)
    every = figures(embeddings, labels, recall_at=(3, 1))
    few = figures(embeddings, labels, recall_at=(3, 1), map_at_r=False, nmi=False)
    assert tuple(few) == ("recall@3", "recall@1", "knn_accuracy")
    assert few == {name: every[name] for name in few}
    check(few, {"recall@3": slow_retrieval(embeddings, labels, recall_at=(3,))["recall@3"]})


def test_bad_input_is_named() -> None:
    embeddings, labels = samples(25)
    metrics = EmbeddingMetrics()
    with pytest.raises(NetsimError, match=r"Expected `embeddings` to be a floating-point tensor of shape \(B, h\)"):
        metrics.update(embeddings[0], labels)
    for wrong in (labels[1:], labels.float()):
        with pytest.raises(NetsimError, match="Expected `labels` to be a tensor of 41 class numbers, one for each sample"):
            metrics.update(embeddings, wrong)
    metrics.update(embeddings, labels)
    with pytest.raises(NetsimError, match=r"of the same size as `earlier embeddings`.*, but got shape \(41, 5\)"):
        metrics.update(embeddings[:, 1:], labels, reference=True)
    with pytest.raises(NetsimError, match="at least one number for each sample, but got a width of 0"):
        EmbeddingMetrics().update(embeddings[:, :0], labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recall_at": 3}, "`recall_at` to be a list of numbers"),
        ({"num_neighbors": 0}, "`num_neighbors` to be a positive int, but got 0"),
        ({"seed": -1}, "`seed` to be an int"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=f"Expected {message}"):
        EmbeddingMetrics(**arguments)


def test_samples_without_a_direction_stay_together_in_clusters() -> None:
    embeddings = torch.cat([torch.eye(3)[[0] * 5], torch.eye(3)[[1] * 5], torch.zeros(5, 3)])
    clusters = {figures(embeddings, torch.arange(15) // 5, seed=seed)["nmi"] for seed in range(5)}
    assert clusters == {1.0}


@pytest.mark.parametrize("gallery", [False, True])
def test_queries_block_by_block(gallery: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = samples(33) if gallery else None
    whole = figures(*samples(32), reference)
    monkeypatch.setattr(room, "_BLOCK_ELEMENTS", 100)
    assert figures(*samples(32), reference) == pytest.approx(whole)
