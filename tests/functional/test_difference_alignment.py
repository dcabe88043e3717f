"""The CTV norm and the alignment of differences: against loops over pairs, as a seminorm, and where nothing is compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import ctv_norm, difference_alignment_loss
from lightning_netsim.functional import difference_alignment as room
from tests import oracles
from tests.functional.common import check, random

NORMS, DIFFERENCES = ("l1", "l2", "squared_l2"), ("distance", "abs", "signed")


INPUTS: dict[str, Callable[[], Tensor]] = {
    "none": lambda: random(0, 0, 3),
    "one": lambda: random(0, 1, 3),
    "two": lambda: random(0, 2, 3),
    "many": lambda: random(0, 11, 4),
    "one column": lambda: random(0, 9, 1),
    "ties": lambda: random(0, 10, 3).round(),
    "equal rows": lambda: random(0, 4, 3)[[0, 1, 1, 2, 0, 3, 1]],
    "all equal": lambda: random(0, 1, 3).expand(5, 3),
    "one column of ties": lambda: random(0, 12, 1).round(),
    "columns of many sizes": lambda: random(0, 8, 3) * torch.tensor([1e-6, 1.0, 1e6]),
    "far away": lambda: random(0, 8, 3) + 1e3,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", INPUTS)
def test_closed_forms_against_the_loop(name: str, norm: str) -> None:
    x = INPUTS[name]().clone().requires_grad_()
    check(ctv_norm(x, norm), oracles.ctv_norm(x, norm), x)
    check(ctv_norm(x, norm, reduction="mean"), oracles.ctv_norm(x, norm, mean=True), x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_constant_does_not_cost_digits(norm: str) -> None:
    x = (random(2, 30, 3) + 1e4).float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    check(ctv_norm(x, norm), oracles.ctv_norm(exact, norm), x, exact=exact, tolerance=3e-6)


@pytest.mark.parametrize("elements", [1, 22, 40])
def test_lengths_block_by_block(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of two (the last of one), and of three (the last of two), with equal rows across blocks."""
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(room, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(torch, "cdist", lambda a, b, **options: sizes.append(len(a) * len(b)) or cdist(a, b, **options))
    x = random(3, 11, 4)
    x[7] = x[2]
    x.requires_grad_()
    found = ctv_norm(x)
    assert len(sizes) > 1
    assert max(sizes) <= max(elements, len(x))
    monkeypatch.undo()
    check(found, oracles.ctv_norm(x, "l2"), x)


# Multiples of a quarter: equal entries and rows are frequent, and sums of few are exact.
MATRICES = st.tuples(st.integers(0, 6), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(-8, 8), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float64).reshape(shape) / 4)
)
SEMINORMS = pytest.mark.parametrize("norm", ["l1", "l2"])


@SEMINORMS
@settings(max_examples=60, deadline=None)
@given(matrix=MATRICES, factor=st.just(0.0) | st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6))
def test_it_is_at_least_zero_and_absolutely_homogeneous(norm: str, matrix: Tensor, factor: float) -> None:
    value = ctv_norm(matrix, norm)
    assert float(value) >= 0
    assert (float(value) == 0) == bool((matrix == matrix[:1]).all())
    torch.testing.assert_close(ctv_norm(factor * matrix, norm), abs(factor) * value, rtol=1e-10, atol=0)


@SEMINORMS
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 6), columns=st.integers(1, 4), size=st.floats(1e-6, 1e6))
def test_the_triangle_inequality(norm: str, seed: int, rows: int, columns: int, size: float) -> None:
    first, second = random(seed, rows, columns), size * random(seed + 1, rows, columns)
    bound = ctv_norm(first, norm) + ctv_norm(second, norm)
    assert float(ctv_norm(first + second, norm)) <= float(bound) * (1 + 1e-12)
    # It is an equality along a ray.
    torch.testing.assert_close(ctv_norm(first + 2 * first, norm), 3 * ctv_norm(first, norm), rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(matrix=MATRICES, constant=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), data=st.data())
def test_neither_a_constant_nor_the_order_counts(norm: str, matrix: Tensor, constant: list[float], data: Any) -> None:
    value = ctv_norm(matrix, norm)
    moved = matrix + torch.tensor(constant, dtype=torch.float64)[: matrix.shape[1]]
    torch.testing.assert_close(ctv_norm(moved, norm), value, rtol=1e-9, atol=1e-9)
    order = data.draw(st.permutations(range(len(matrix))))
    torch.testing.assert_close(ctv_norm(matrix[list(order)], norm), value, rtol=1e-12, atol=1e-12)


ALL_PAIRS = list(combinations(range(8), 2))
SOME_PAIRS = [(3, 1), (0, 4), (5, 2), (6, 7), (2, 6), (0, 4), (3, 0), (5, 6)]
LABELS: dict[str, Tensor | None] = {
    "none": None,
    "distinct": torch.arange(8) + 5,
    "classes": torch.tensor([0, 1, 0, 2, 2, 1, 0, 3]),
    "negative": torch.tensor([0, -1, 0, 2, -2, 1, 0, -1]),
    "two classes": torch.tensor([1, 0, 0, 0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("pairs", [None, SOME_PAIRS], ids=["all pairs", "given pairs"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("norm", NORMS)
def test_alignment_against_the_loop(norm: str, difference: str, labels: str, pairs: list[tuple[int, int]] | None) -> None:
    x, given = random(7, 8, 3).requires_grad_(), LABELS[labels]
    found = difference_alignment_loss(x, given, None if pairs is None else torch.tensor(pairs).T, difference, norm)
    classes = torch.arange(8) if given is None else given
    wanted = oracles.difference_alignment(x, classes, pairs or ALL_PAIRS, difference, norm)
    assert float(wanted.detach()) > 0
    check(found, wanted, x)


def test_equal_embeddings_have_a_finite_gradient() -> None:
    for difference in DIFFERENCES:
        x = torch.zeros(4, 3, requires_grad=True)
        loss = difference_alignment_loss(x, torch.tensor([0, 1, 2, 2]), difference=difference)
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, x)[0].any()


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "no difference": lambda x: ctv_norm(x[:0]),
    "one difference": lambda x: ctv_norm(x[:1], "squared_l2", "mean"),
    "no sample": lambda x: difference_alignment_loss(x[:0]),
    "one sample": lambda x: difference_alignment_loss(x[:1]),
    "two samples": lambda x: difference_alignment_loss(x[:2], torch.tensor([0, 1]), difference="signed"),
    "one class": lambda x: difference_alignment_loss(x, torch.zeros(5).long(), norm="squared_l2"),
    "one class and no label": lambda x: difference_alignment_loss(x, torch.tensor([0, -1, 0, -2, 0])),
    "no label": lambda x: difference_alignment_loss(x, torch.full((5,), -1), difference="abs", norm="l1"),
    "no pair": lambda x: difference_alignment_loss(x, None, torch.zeros(2, 0).long()),
    "one pair": lambda x: difference_alignment_loss(x, None, torch.tensor([[0], [3]])),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_be_compared_there_is_a_zero_with_a_graph(name: str) -> None:
    x = random(10, 5, 3).requires_grad_()
    loss = NOTHING[name](x)
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_lengths_between_near_differences_keep_their_digits(spread: float) -> None:
    m = spread * random(0, 64, 8)
    m[:32] += 5
    x = m.float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    [found] = torch.autograd.grad(ctv_norm(x), x)
    [wanted] = torch.autograd.grad(torch.pdist(exact).sum(), exact)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_sample_and_itself_are_of_one_class_without_labels_too() -> None:
    z, pairs = random(0, 4, 3), torch.tensor([[0, 1, 2], [1, 2, 2]])
    torch.testing.assert_close(difference_alignment_loss(z, None, pairs), difference_alignment_loss(z, torch.arange(4), pairs))
