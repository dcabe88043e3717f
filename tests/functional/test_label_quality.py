from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import label_quality, label_votes
from lightning_netsim.functional.label_quality import OWN_VOTE
from tests.issue_oracles import quality, votes

CLASSES, K = 5, 7


def random_case(number: int = 60, missing: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return neighbors' labels, with gaps at the end as a search leaves them, predictions, margins and labels."""
    near = torch.randint(CLASSES, (number, K))
    near[torch.arange(K) >= torch.randint(0, K + 1, (number, 1)) + (torch.rand(number, 1) > missing) * K] = -1
    return near, torch.randint(-1, CLASSES, (number,)), torch.rand(number), torch.randint(CLASSES, (number,))


@pytest.mark.parametrize("with_network", [False, True])
def test_votes_and_quality_against_loops(with_network: bool) -> None:
    near, predictions, margin, labels = random_case()
    assert (near < 0).all(1).any()
    assert ((near < 0).any(1) & (near >= 0).any(1)).any()
    found = label_votes(near, CLASSES, predictions, margin) if with_network else label_votes(near, CLASSES)
    scores = label_quality(found, labels)
    for row, seen in enumerate(near.tolist()):
        own = (int(predictions[row]), float(margin[row])) if with_network else (None, None)
        slow = dict(votes([label for label in seen if label >= 0], *own))
        assert found[row].tolist() == pytest.approx([slow.get(c, 0.0) for c in range(CLASSES)])
        slow.pop(-1, None)
        assert float(scores[row]) == pytest.approx(quality(slow, int(labels[row]))[0])


def test_a_margin_that_is_not_known_or_a_prediction_that_is_no_class_has_no_vote() -> None:
    near = torch.tensor([[0, 1], [0, 1]])
    found = label_votes(near, 2, torch.tensor([1, -1]), torch.tensor([math.nan, 1.0]))
    torch.testing.assert_close(found, label_votes(near, 2) / (1 + OWN_VOTE))


def test_without_predictions_or_without_margin_only_neighbors_vote() -> None:
    near, predictions, margin, _ = random_case()
    torch.testing.assert_close(label_votes(near, CLASSES, predictions), label_votes(near, CLASSES))
    torch.testing.assert_close(label_votes(near, CLASSES, margin=margin), label_votes(near, CLASSES))


def test_the_only_class_is_sure_where_all_vote_for_it() -> None:
    found = label_votes(torch.zeros(3, 4, dtype=torch.int64), 1)
    assert label_quality(found, torch.zeros(3, dtype=torch.int64)).tolist() == pytest.approx([1.0] * 3)


def test_of_no_votes_nothing_can_be_said() -> None:
    assert label_quality(torch.zeros(2, 3), torch.tensor([0, 2])).tolist() == [0.5, 0.5]
    assert label_votes(torch.full((2, 3), -1), 4).tolist() == [[0.0] * 4] * 2


def test_no_samples() -> None:
    found = label_votes(torch.zeros(0, 3, dtype=torch.int64), 2)
    assert found.shape == (0, 2)
    assert label_quality(found, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_and_renaming_of_classes(data: st.DataObject) -> None:
    number, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    rows = st.lists(st.integers(-1, CLASSES - 1), min_size=k, max_size=k)
    near = torch.tensor(data.draw(st.lists(rows, min_size=number, max_size=number)))
    classes = st.lists(st.integers(0, CLASSES - 1), min_size=number, max_size=number)
    predictions, labels = torch.tensor(data.draw(classes)), torch.tensor(data.draw(classes))
    margin = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=number, max_size=number)))
    found = label_votes(near, CLASSES, predictions, margin)
    score = label_quality(found, labels)
    assert (found >= 0).all()
    assert (found.sum(1) <= 1 + 1e-12).all()
    assert ((score >= 0) & (score <= 1)).all()
    most = found.amax(1) - found.gather(1, labels[:, None])[:, 0]
    assert ((score < 0.5) == (most > 1e-15)).logical_or(most.abs() < 1e-12).all()
    name = torch.tensor(data.draw(st.permutations(range(CLASSES))))
    renamed = torch.where(near >= 0, name[near.clamp_min(0)], near)
    again = label_votes(renamed, CLASSES, name[predictions], margin)
    torch.testing.assert_close(again[:, name], found)
    torch.testing.assert_close(label_quality(again, name[labels]), score)
