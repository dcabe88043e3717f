"""Classes in a whole measurement, by every plan: held to means over all pairs, and given up where they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim import analyze
from lightning_netsim.data import trees
from lightning_netsim.data.batches import SimilarityBatch
from lightning_netsim.data.sources import Chunk, SampleSource, from_batches, from_loader
from lightning_netsim.jacobian.feature_batches import DenseFeatureBatch
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sums import Counting
from lightning_netsim.measurement.swept_set import SweptSet
from tests import cases, class_oracles, oracles
from tests.measuring import Dead, classifier, loader, oracle, whole

PLANS = ["store", "sketch", "reiterate"]
#: From what is stored, and in passing.
WAYS = ["store", "reiterate"]
LABELS: dict[str, list[Any]] = {
    "numbers": [2, 0, 1, 0, 2, 2, 0],
    "names": ["owl", "ant", "bee", "ant", "owl", "owl", "ant"],
    "both": [7, "ant", 0, "ant", 7, 7, "ant"],
    "one each": [6, 5, 4, 3, 2, 1, 0],
    "one": [3] * 7,
}


def labeled(inputs: Any, labels: Any, size: int = 2) -> SampleSource:
    """Return samples in batches (inputs, labels); no labels for None."""
    count = trees.batch_size(inputs) or 1
    parts = [slice(start, start + size) for start in range(0, count, size)]
    pieces = [trees.take(inputs, part, count) for part in parts]
    return from_batches(pieces if labels is None else [(x, labels[part]) for x, part in zip(pieces, parts, strict=True)])


def chosen(plan: str, **settings: Any) -> SweepSettings:
    return SweepSettings(
        **{"k": 2, "directions": "all", "plan": plan, "projection_dim": 60, "compare_activations": False, **settings}
    )


def measure(name: str, labels: Any, plan: str, size: int = 2, **settings: Any) -> SimilarityResult:
    model, inputs = cases.build(name)
    return measure_similarity(model, labeled(inputs, labels, size), settings=chosen(plan, **settings))


def close(found: Tensor | None, wanted: Tensor, atol: float = 2e-5) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol, equal_nan=True)


def check(
    result: SimilarityResult, similarity: Tensor, labels: Sequence[Any], pairs: Tensor, own: Sequence[Any], same: bool
) -> None:
    """Hold a result to loops: the table to `similarity` of the reference, the means to `pairs` of queries with it."""
    classes, counts, table = class_oracles.class_table(similarity, labels)
    assert result.classes is not None
    assert result.classes.classes == classes
    assert result.classes.num_samples.tolist() == counts
    close(result.classes.similarity, table)
    means = class_oracles.class_means(pairs, own, labels, same)
    close(result.same_class, means[0])
    close(result.other_class, means[1])


def without_classes(result: SimilarityResult) -> bool:
    return result.classes is None and result.same_class is None and result.other_class is None


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlp_1", "numbers"), *(("mlp_2", kind) for kind in LABELS)],
)
def test_a_set_with_itself(name: str, kind: str, plan: str) -> None:
    labels, similarity = LABELS[kind], oracle(name)
    result = measure(name, labels, plan)
    assert result.plan["kind"] == plan
    check(result, similarity, labels, similarity, labels, same=True)
    assert result.notes == ()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["mlp_2", "tied_through_function"])
def test_queries_apart_from_the_reference(name: str, plan: str) -> None:
    model, inputs = cases.build(name)
    similarity = oracle(name)
    own, labels = ["a", "c"], ["b", "a", "a", "b", "b"][: len(inputs) - 2]
    result = measure_similarity(model, labeled(inputs[:2], own, 1), labeled(inputs[2:], labels), chosen(plan))
    check(result, similarity[2:, 2:], labels, similarity[:2, 2:], own, same=False)
    assert result.same_class is not None
    assert result.same_class.isnan().tolist() == [False, True]


@pytest.mark.parametrize("plan", WAYS)
@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (None, ["a", "b", "a", "b"]),
        (torch.rand(3), ["a", "b", "a", "b"]),
        (["a", "b", "a"], None),
        (["a", "b", "a"], [0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_what_can_be_said_where_one_of_two_sets_has_no_classes(own: Any, labels: Any, plan: str) -> None:
    model, inputs = cases.build("mlp_2")
    result = measure_similarity(model, labeled(inputs[:3], own), labeled(inputs[3:], labels), chosen(plan))
    torch.testing.assert_close(result.counts.soft.double(), oracle("mlp_2")[:3, 3:].sum(1), rtol=0, atol=1e-5)
    assert (result.same_class, result.other_class) == (None, None)
    assert (result.classes is None) == isinstance(own, list)
    if result.classes is not None:
        close(result.classes.similarity, class_oracles.class_table(oracle("mlp_2")[3:, 3:], labels)[2])


NO_CLASSES = {
    "none": None,
    "quantities": torch.rand(7),
    "masks": torch.zeros(7, 4, 4).long(),
    "a quantity in the last batch": [0, 1, 0, 1, 0, 1, 0.5],
}


@pytest.mark.parametrize("plan", WAYS)
@pytest.mark.parametrize("kind", NO_CLASSES)
def test_labels_that_are_no_classes_change_nothing(kind: str, plan: str) -> None:
    result, plain = measure("mlp_2", NO_CLASSES[kind], plan), measure("mlp_2", LABELS["numbers"], plan)
    assert without_classes(result)
    assert plain.classes is not None
    assert torch.equal(result.counts.soft, plain.counts.soft)
    assert torch.equal(result.neighbors.index, plain.neighbors.index)
    assert torch.equal(result.neighbors.similarity, plain.neighbors.similarity)
    assert result.notes == ()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("size", "chunk_size"), [(1, 64), (7, 3)])
def test_chunks_do_not_matter(size: int, chunk_size: int, plan: str) -> None:
    labels, similarity = LABELS["both"], oracle("mlp_2")
    result = measure("mlp_2", labels, plan, size, chunk_size=chunk_size)
    check(result, similarity, labels, similarity, labels, same=True)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_over_all_classes_the_sums_are_the_soft_counts(plan: str, apart: bool) -> None:
    torch.manual_seed(2)
    inputs, labels, other = torch.randn(90, 6), torch.arange(90) % 4, torch.randn(70, 6)
    others = (torch.arange(70) % 3).tolist()
    queries = from_loader(loader(inputs, labels), whole)
    reference = labeled(other, others, 16) if apart else None
    result = measure_similarity(classifier(), queries, reference, chosen(plan))
    compared = others if apart else labels.tolist()
    same = torch.tensor([compared.count(label) - (not apart) for label in labels.tolist()])
    rest = len(compared) - (not apart) - same
    assert result.same_class is not None
    assert result.other_class is not None
    assert bool((result.same_class.isnan() == (same == 0)).all())
    total = result.same_class.nan_to_num().double() * same + result.other_class.double() * rest + (not apart)
    torch.testing.assert_close(total, result.counts.soft.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [1, 4])
def test_left_out_samples_belong_to_no_class(size: int, plan: str, apart: bool) -> None:
    model, inputs = Dead(), torch.rand(9, 3) + 0.1
    inputs[0], inputs[4], inputs[5] = -1.0, torch.nan, -2.0
    labels = ["gone", 1, 1, 2, 1, "gone", 2, "alone", 1]
    reference = labeled(inputs, labels, size) if apart else None
    result = measure_similarity(model, labeled(inputs, labels, size), reference, chosen(plan, projection_dim=30))
    similarity = oracles.dense_similarity(oracles.loop_jacobian(model, inputs))
    check(result, similarity, labels, similarity, labels, same=not apart)
    assert result.classes is not None
    assert result.classes.classes == [1, 2, "alone"]
    for means in (result.same_class, result.other_class):
        assert means is not None
        assert bool(means[[0, 4, 5]].isnan().all())


@pytest.mark.parametrize("plan", WAYS)
def test_a_subset_keeps_the_labels_of_its_samples(plan: str) -> None:
    model, inputs, labels = classifier(), torch.randn(30, 6), torch.arange(30) % 3
    queries = from_loader(loader(inputs, labels, 4), whole, max_samples=11, seed=4)
    result = measure_similarity(model, queries, settings=chosen(plan))
    rows = result.queries.index
    similarity = oracles.dense_similarity(oracles.loop_jacobian(model, inputs[rows]), 1e-6)
    own = labels[rows].tolist()
    check(result, similarity, own, similarity, own, same=True)


@pytest.mark.parametrize("plan", WAYS)
def test_without_room_classes_are_left_out_and_all_else_stays(plan: str) -> None:
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3))
    inputs, labels = torch.randn(24, 6), torch.arange(24) % 8
    settings = {"chunk_size": 8, "projection_dim": 20}
    rich = measure_similarity(model, labeled(inputs, labels, 8), settings=chosen(plan, **settings))
    # The sums take 8 · 3 · 3003 · 4 bytes.
    tight = {**settings, "memory_budget": 8 * 8 * 3 * 3003 * 4 - 8.0}
    poor = measure_similarity(model, labeled(inputs, labels, 8), settings=chosen(plan, **tight))
    assert rich.classes is not None
    assert without_classes(poor)
    assert poor.notes == (
        "The similarity of classes is left out: the sums of their gradients take more than an eighth of the memory budget. "
        "Choose a larger `memory_budget`, fewer `directions` or fewer `parameters`.",
    )
    assert rich.notes == ()
    torch.testing.assert_close(poor.counts.soft, rich.counts.soft, rtol=0, atol=1e-5)
    torch.testing.assert_close(poor.neighbors.similarity, rich.neighbors.similarity, rtol=0, atol=1e-6)
    assert torch.equal(poor.neighbors.index, rich.neighbors.index)
    unlabeled = measure_similarity(model, labeled(inputs, None, 8), settings=chosen(plan, **tight))
    assert unlabeled.notes == ()
    enough = {**settings, "memory_budget": tight["memory_budget"] + 8}
    assert measure_similarity(model, labeled(inputs, labels, 8), settings=chosen(plan, **enough)).classes is not None


def test_an_analysis_shows_the_table() -> None:
    model, inputs, labels = classifier(), torch.randn(20, 6), torch.arange(20) % 3
    analysis = analyze(model, loader(inputs, labels), k=2, directions="all", progress=False)
    similarity = oracles.dense_similarity(oracles.loop_jacobian(model, inputs), 1e-6)
    matrix = analysis.class_similarity()
    assert list(matrix.index) == list(matrix.columns) == [0, 1, 2]
    close(torch.tensor(matrix.to_numpy()), class_oracles.class_table(similarity, labels.tolist())[2])
    means = class_oracles.class_means(similarity, labels.tolist(), labels.tolist(), same=True)
    close(torch.tensor(analysis.samples["same_class_similarity"].to_numpy()), means[0])
    close(torch.tensor(analysis.samples["other_class_similarity"].to_numpy()), means[1])


def swept(counting: Counting, features: DenseFeatureBatch, labels: Any, start: int = 0) -> SweptSet:
    """Return a set of some samples, after they were summed."""
    part, number = SweptSet(from_batches([]), 1e9, None), len(features.valid)
    if number:
        read = SimilarityBatch(torch.zeros(number, 2), labels)
        counting.add(counting.sum(features, read), int(features.valid.sum()))
        part.table.add(Chunk(None, torch.arange(start, start + number)), read, features)
    return part


def shared(*labels: Any) -> list[Counting]:
    """Count the same vector under some labels, those of each process."""
    countings = [Counting(1e9, in_passing=True) for _ in labels]
    starts = [sum(map(len, labels[:rank])) for rank in range(len(labels))]
    sets = [
        swept(counting, DenseFeatureBatch(torch.ones(len(own), 1)), own, start)
        for counting, own, start in zip(countings, labels, starts, strict=True)
    ]
    class_oracles.in_threads(lambda processes: countings[processes.rank].merge(sets[processes.rank], processes), len(labels))
    return countings


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(([0, 1, 0], [2, 1]), [0, 1, 2]), (([0, 1, 0], []), [0, 1]), (([0, 1, 0], [0.5, 1.0]), None)],
)
def test_processes_share_their_classes(labels: Any, classes: list[Any] | None) -> None:
    for counting in shared(*labels):
        result = counting.classes.compute()
        assert (None if result is None else result.classes) == classes


@pytest.mark.parametrize(
    ("labels", "are_few"),
    [
        (list(range(20)), True),
        (list(range(21)), False),
        ([f"caption {place}" for place in range(30)] * 2, True),
        ([f"caption {place}" for place in range(30)] * 2 + [f"text {place}" for place in range(2)], False),
    ],
)
def test_names_of_samples_are_no_classes(labels: list[Any], are_few: bool) -> None:
    (alone,) = shared(labels)
    assert alone.classes.is_kept == are_few
    note = f"The similarity of classes is left out: there are {len(set(labels))} different labels."
    assert alone.notes == (set() if are_few else {note})
    # What is too many is a matter of the whole set, not of the part of one process.
    half = len(labels) // 2
    for counting in shared(labels[:half], labels[half:]):
        assert counting.classes.is_kept == are_few
        assert counting.notes == alone.notes
