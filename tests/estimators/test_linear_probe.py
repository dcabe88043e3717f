"""The accuracy of a linear classifier against another library's, trained and judged in a loop over folds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators import LinearProbe

CLASSES = 4


def samples(seed: int, size: int = 160, width: int = 6, signal: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return embeddings of any length whose classes overlap, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    directions = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    embeddings = signal * directions[labels] + torch.randn(size, width, generator=generator)
    return embeddings * (0.1 + 5 * torch.rand(size, 1, generator=generator)), labels


def accuracy(embeddings: Tensor, labels: Tensor, reference: tuple[Tensor, Tensor] | None = None, **settings: Any) -> float:
    probe = LinearProbe(**settings)
    probe.update(embeddings, labels)
    if reference is not None:
        probe.update(*reference, reference=True)
    return probe.compute().item()


def slow_predictions(train: tuple[Tensor, Tensor], judged: Tensor, weight_decay: float = 1e-3) -> Tensor:
    """Return what another library's classifier says, trained to convergence in float64."""
    classifier = pytest.importorskip("sklearn.linear_model").LogisticRegression
    rows, others = (F.normalize(each.double(), dim=1) for each in (train[0], judged))
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    # It minimizes the sum of the losses, and weighs that by C.
    fitted = classifier(C=1 / (len(rows) * weight_decay), tol=1e-8, max_iter=10_000)
    fitted.fit(((rows - mean) / deviation).numpy(), train[1].numpy())
    return torch.from_numpy(fitted.predict(((others - mean) / deviation).numpy()))


@pytest.mark.parametrize("weight_decay", [1e-3, 0.03, 1.0])
def test_predictions_are_those_of_another_library(weight_decay: float) -> None:
    train, (queries, truth) = samples(0), samples(1, 400)
    wanted = slow_predictions(train, queries, weight_decay)
    assert wanted.unique().numel() > 2
    # Judged by the other's predictions, the accuracy is the share on which both agree.
    assert accuracy(queries, wanted, train, weight_decay=weight_decay) >= 0.99
    assert 0.4 < accuracy(queries, truth, train, weight_decay=weight_decay) < 0.9
    if weight_decay == 1.0:  # Where both agree whatever the penalty, nothing would have been compared.
        assert accuracy(queries, wanted, train, weight_decay=1e-3) < 0.97


def test_cross_validation_is_that_of_a_loop_over_folds() -> None:
    embeddings, labels = samples(2, 63)
    fold = torch.empty(63, dtype=torch.int64)
    turn = 0
    for label in range(CLASSES):
        for i in range(63):
            if labels[i] == label:
                fold[i], turn = turn % 5, turn + 1
    correct = 0
    for each in range(5):
        inside = fold == each
        found = slow_predictions((embeddings[~inside], labels[~inside]), embeddings[inside])
        correct += int((found == labels[inside]).sum())
    assert 0.4 < correct / 63 < 0.9
    assert accuracy(embeddings, labels) == pytest.approx(correct / 63, abs=1.5 / 63)


@pytest.mark.parametrize("folds", [2, 5])
def test_a_sample_is_never_judged_by_a_classifier_that_has_seen_it(folds: int) -> None:
    # With more coordinates than samples any labels can be learned by heart, and only those that were seen.
    embeddings = torch.randn(80, 100)
    labels = torch.arange(80) % CLASSES
    assert accuracy(embeddings, labels, (embeddings, labels)) == 1
    assert 0.05 < accuracy(embeddings, labels, folds=folds) < 0.45


def test_every_class_is_spread_over_the_folds() -> None:
    # Each fold has one sample of each class, in whatever order they come, so that no class is missing in training.
    for labels in (torch.arange(35)[torch.randperm(35)] % 7, torch.arange(7).repeat_interleave(5)):
        assert accuracy(torch.eye(7)[labels], labels, folds=5) == 1
    alone = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 3])  # A class of one sample cannot be learned.
    assert accuracy(torch.eye(4)[alone], alone, folds=4) == pytest.approx(0.8)


def test_classes_without_a_reference_sample_are_failures() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    known = torch.tensor([0, 0, 2, 2, 9])
    assert accuracy(torch.eye(4)[labels], labels, (torch.eye(10)[known][:, :4], known)) == 0.5


def test_a_strong_penalty_leaves_the_largest_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 5)
    embeddings = torch.eye(3)[labels]
    assert accuracy(embeddings, labels, (embeddings, labels), weight_decay=1e4) == pytest.approx(20 / 35)
    assert accuracy(embeddings, labels, (embeddings, labels)) == 1


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_embeddings_without_a_direction_spoil_no_others(value: float) -> None:
    labels = torch.arange(60) % CLASSES
    embeddings = torch.eye(CLASSES)[labels] + 0.05 * torch.randn(60, CLASSES)
    embeddings[7] = value
    assert accuracy(embeddings, labels) >= 59 / 60 - 1e-6
    assert accuracy(embeddings[8:], labels[8:], (embeddings, labels)) == 1
    assert math.isfinite(accuracy(torch.full((8, 3), value), labels[:8]))


def test_few_samples() -> None:
    none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    some = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    assert math.isnan(accuracy(*none))
    assert math.isnan(accuracy(*none, some))
    assert math.isnan(accuracy(some[0][:1], some[1][:1]))
    assert accuracy(some[0][:1], some[1][:1], none) != accuracy(some[0][:1], some[1][:1], some) == 1
    assert accuracy(some[0][:2], some[1][:2]) == 1  # One class is always right,
    assert accuracy(some[0][1:3], some[1][1:3]) == 0  # one that was not there never.
    assert accuracy(*some, (some[0][:1], some[1][:1])) == 0.5
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert LinearProbe().compute().isnan()


@pytest.mark.parametrize(("mode", "reference"), [(torch.no_grad, True), (torch.inference_mode, False)])
def test_it_learns_where_nothing_else_is_differentiated(mode: Any, reference: bool) -> None:
    embeddings, labels = samples(12)
    train = samples(13) if reference else None
    with mode():
        inside = accuracy(embeddings.clone(), labels.clone(), train)
    assert inside == accuracy(embeddings, labels, train) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folds": 1}, "`folds` to be at least 2"),
        ({"max_iterations": 2.0}, "`max_iterations` to be a positive int, but got 2.0"),
        ({"weight_decay": 0}, "`weight_decay` to be a positive number, but got 0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=f"Expected {message}"):
        LinearProbe(**arguments)
