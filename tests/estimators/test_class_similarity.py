"""Similarity of classes from one sum each, against loops over all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim.estimators import ClassSimilarity, class_similarity
from lightning_netsim.estimators.class_similarity import MAX_CLASSES
from lightning_netsim.functional.results import ClassSimilarityResult
from lightning_netsim.jacobian.feature_batches import AbstractFeatureBatch, DenseFeatureBatch
from lightning_netsim.jacobian.features import GradientFeatures
from tests import cases, class_oracles, measuring

LABELS: dict[str, list[Any]] = {
    "numbers": [2, 0, 1, 0, 2, 2, 0],
    "names": ["owl", "ant", "bee", "ant", "owl", "owl", "ant"],
    "both": [7, "ant", 0, "ant", 7, 7, "ant"],
    "one each": [6, 5, 4, 3, 2, 1, 0],
    "one": [3] * 7,
}


def updated(batches: Sequence[tuple[AbstractFeatureBatch, list[Any]]]) -> ClassSimilarity:
    classes = ClassSimilarity()
    for features, labels in batches:
        classes.update(features, labels)
    return classes


def computed(classes: ClassSimilarity) -> ClassSimilarityResult:
    result = classes.compute()
    assert result is not None
    return result


def check(classes: ClassSimilarity, similarity: Tensor, labels: Sequence[Any], atol: float = 1e-5) -> None:
    """Hold what was computed to the loop over all pairs of the reference set."""
    result, (wanted, counts, table) = computed(classes), class_oracles.class_table(similarity, labels)
    assert result.classes == wanted
    assert result.num_samples.tolist() == counts
    torch.testing.assert_close(result.similarity.double(), table, rtol=0, atol=atol, equal_nan=True)


def gradients(name: str, sizes: tuple[int, ...]) -> list[AbstractFeatureBatch]:
    model, inputs = cases.build(name)
    features = GradientFeatures(model, directions="all")
    return [features(part) for part in inputs.split(sizes)]


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", ["mlp_1", "mlp_10"])
def test_the_table_holds_means_over_all_pairs(name: str, kind: str) -> None:
    similarity, labels = measuring.oracle(name), LABELS[kind]
    first, last = gradients(name, (3, 4))
    classes = updated([(first, labels[:3]), (last, labels[3:])])
    check(classes, similarity, labels)
    sums = torch.cat([classes.query(first, labels[:3]), classes.query(last, labels[3:])])
    torch.testing.assert_close(sums.double(), class_oracles.class_sums(similarity, labels, labels), rtol=0, atol=2e-5)
    found, wanted = (
        classes.means(sums, similarity.sum(1), labels, is_reference=True),
        class_oracles.class_means(similarity, labels, labels, same=True),
    )
    for values, means in zip(found, wanted, strict=True):
        torch.testing.assert_close(values.double(), means, rtol=0, atol=2e-5, equal_nan=True)


def test_products_of_the_sums_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (features,) = gradients("mlp_2", (7,))
    classes = updated([(features, LABELS["both"])])
    whole = computed(classes)
    for elements in (1, 20):
        monkeypatch.setattr(class_similarity, "_ELEMENTS", elements)
        torch.testing.assert_close(computed(classes).similarity, whole.similarity, rtol=0, atol=1e-6, equal_nan=True)


def test_queries_apart_from_the_reference() -> None:
    similarity = measuring.oracle("mlp_2")
    asked, compared = gradients("mlp_2", (4, 3))
    labels, reference = ["a", "b", "c", "a"], ["a", "b", "b"]
    classes = updated([(compared, reference)])
    check(classes, similarity[4:, 4:], reference)
    sums = classes.query(asked, labels)
    assert float(sums[2]) == 0
    torch.testing.assert_close(
        sums.double(), class_oracles.class_sums(similarity[:4, 4:], labels, reference), rtol=0, atol=1e-5
    )
    found = classes.means(sums, similarity[:4, 4:].sum(1), labels)
    wanted = class_oracles.class_means(similarity[:4, 4:], labels, reference, same=False)
    for values, means in zip(found, wanted, strict=True):
        torch.testing.assert_close(values.double(), means, rtol=0, atol=1e-5, equal_nan=True)


def test_numbers_come_before_names_and_both_ascend() -> None:
    labels = ["b", 10, "a", 9, "B", -1, "10"]
    result = computed(updated([(DenseFeatureBatch(torch.eye(7)), labels)]))
    assert result.classes == [-1, 9, 10, "10", "B", "a", "b"]
    assert result.similarity.isnan().equal(torch.eye(7, dtype=torch.bool))


def test_left_out_samples_belong_to_no_class() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8], [torch.nan, 1.0], [0.0, 2.0]])
    labels = ["a", "a", "a", "nothing but this", "b"]
    batch = DenseFeatureBatch(vectors)
    classes = updated([(batch, labels)])
    similarity = batch.inner(batch)
    check(classes, similarity, labels)
    assert computed(classes).classes == ["a", "b"]
    sums = classes.query(batch, labels)
    torch.testing.assert_close(sums, torch.tensor([1.6, torch.nan, 1.6, torch.nan, 1.0]), equal_nan=True)
    same, other = classes.means(sums, similarity.nansum(1).where(batch.valid, torch.nan), labels, is_reference=True)
    torch.testing.assert_close(same, torch.tensor([0.6, torch.nan, 0.6, torch.nan, torch.nan]), equal_nan=True)
    torch.testing.assert_close(other, torch.tensor([0.0, torch.nan, 0.8, torch.nan, 0.4]), equal_nan=True)


def test_a_parameter_that_only_some_batches_use() -> None:
    class Batch(DenseFeatureBatch):
        def sum(self) -> dict[str, Tensor]:
            return {**super().sum(), "extra": torch.ones(1)}

        def select(self, rows: Tensor) -> Batch:
            return Batch(self.vectors()[rows])

    classes = updated([(DenseFeatureBatch(torch.eye(2)), [0, 1]), (Batch(torch.eye(2)), [1, 1])])
    assert computed(classes).similarity[0, 1] == pytest.approx(1 / 3)
    # ‖(1, 2, extra)‖² of class 1, its three samples taken away, over six ordered pairs.
    assert computed(classes).similarity[1, 1] == pytest.approx((1 + 4 + 1 - 3) / 6)


def test_sums_are_not_changed_by_adding_them() -> None:
    classes, batch = ClassSimilarity(), DenseFeatureBatch(torch.eye(2))
    sums = classes.sums(batch, [0, 0])
    before = sums[0][0]["vector"].clone()
    for _ in range(3):
        classes.add(sums)
    assert torch.equal(sums[0][0]["vector"], before)
    assert computed(classes).num_samples.tolist() == [6]
    first = computed(classes).similarity
    assert torch.equal(computed(classes).similarity, first)


def test_beyond_the_limit_the_sums_are_given_up() -> None:
    batch, room = DenseFeatureBatch(torch.eye(3)), 2 * 3 * 4
    classes = ClassSimilarity(limit=room)
    classes.update(batch, [0, 1, 0])
    assert classes.is_kept
    assert classes.nbytes == room
    classes.update(batch, [0, 1, 2])
    assert not classes.is_kept
    assert classes.nbytes == room + 12
    assert classes.compute() is None
    with pytest.raises(ValueError, match="Expected `limit` to be at least 36 bytes for the sums of the classes, but got 24"):
        classes.query(batch, [0, 1, 2])
    classes.reset()
    classes.update(batch, [1, 1, 1])
    assert computed(classes).classes == [1]


def test_more_than_so_many_classes_are_none() -> None:
    classes, ones = ClassSimilarity(), DenseFeatureBatch(torch.ones(MAX_CLASSES, 1))
    classes.update(ones, list(range(MAX_CLASSES)))
    assert torch.equal(computed(classes).similarity.isnan(), torch.eye(MAX_CLASSES, dtype=torch.bool))
    classes.update(ones, [5] * MAX_CLASSES)
    assert computed(classes).num_samples[5] == MAX_CLASSES + 1
    other = updated([(DenseFeatureBatch(torch.ones(2, 1)), ["one more", 5])])
    parts = [classes, other]
    merged(parts)
    assert [part.compute() for part in parts] == [None, None]
    other.update(ones, list(range(MAX_CLASSES)))
    assert not other.is_kept


def test_as_many_labels_as_samples() -> None:
    batch = DenseFeatureBatch(torch.eye(3))
    classes = updated([(batch, [0, 1, 2])])
    for call in (classes.update, classes.query, classes.sums):
        with pytest.raises(ValueError, match="Expected `labels` to be 3 classes, one for each sample, but got 2"):
            call(batch, [0, 1])


def merged(parts: list[ClassSimilarity]) -> None:
    """Merge the sums of some processes."""
    class_oracles.in_threads(lambda processes: parts[processes.rank].merge(processes), len(parts))


def test_several_processes_have_the_table_of_one() -> None:
    torch.manual_seed(3)
    vectors, labels = torch.randn(9, 4), ["a", 3, "b", 3, "rare", 3, "b", "a", "a"]
    batches = [DenseFeatureBatch(part) for part in vectors.split((4, 4, 1))]
    bounds = [labels[:4], labels[4:8], labels[8:]]
    alone = updated(list(zip(batches, bounds, strict=True)))
    parts = [updated([(batch, own)]) for batch, own in zip(batches, bounds, strict=True)] + [ClassSimilarity()]
    merged(parts)
    for part in parts:
        assert computed(part).classes == computed(alone).classes
        assert torch.equal(computed(part).num_samples, computed(alone).num_samples)
        torch.testing.assert_close(computed(part).similarity, computed(alone).similarity, equal_nan=True)
        torch.testing.assert_close(part.query(batches[0], bounds[0]), alone.query(batches[0], bounds[0]))


def test_what_does_not_fit_in_all_or_one_has_given_up_all_give_up() -> None:
    limited, dropped = ([ClassSimilarity(limit) for _ in range(2)] for limit in (16, math.inf))
    for parts in (limited, dropped):
        for rank, part in enumerate(parts):
            part.update(DenseFeatureBatch(torch.eye(2)), [2 * rank, 2 * rank + 1])
            assert part.is_kept
    dropped[1].drop()
    for parts in (limited, dropped):
        merged(parts)
        assert [part.is_kept for part in parts] == [False, False]
        assert [part.compute() for part in parts] == [None, None]
