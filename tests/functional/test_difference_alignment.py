"""The CTV norm and the alignment of differences: against loops over pairs, as a seminorm, and where nothing is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.functional import ctv_norm, difference_alignment_loss
from lightning_netsim.functional import difference_alignment as room
from tests import oracles

NORMS, DIFFERENCES = ("l1", "l2", "squared_l2"), ("distance", "abs", "signed")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, wanted: Tensor, *leaves: Tensor, tolerance: float = 1e-10) -> None:
    """Hold the value, and the gradient by `leaves[0]` to that by `leaves[-1]`, to a relative tolerance."""
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=tolerance, atol=1e-14)
    mine, other = (torch.autograd.grad(v, x)[0].double() for v, x in ((found, leaves[0]), (wanted, leaves[-1])))
    scale = float(other.norm())
    assert float((mine - other).norm()) <= max(tolerance * scale, 1e-14), f"gradient of norm {scale}"


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


def test_the_norm_of_the_defaults_is_the_sum_of_lengths() -> None:
    x = random(1, 6, 3)
    torch.testing.assert_close(ctv_norm(x), oracles.ctv_norm(x, "l2"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_constant_does_not_cost_digits(norm: str) -> None:
    x = (random(2, 30, 3) + 1e4).float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    check(ctv_norm(x, norm), oracles.ctv_norm(exact, norm), x, exact, tolerance=3e-6)


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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(norm: str, reduction: str) -> None:
    for shape in ((5, 3), (6, 1), (2, 2)):
        assert torch.autograd.gradcheck(lambda x: ctv_norm(x, norm, reduction), (random(4, *shape).requires_grad_(),))


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


@pytest.mark.parametrize(("norm", "each"), [("l1", 2.0), ("l2", math.sqrt(2)), ("squared_l2", 2.0)])
@pytest.mark.parametrize("size", [2, 3, 17])
def test_the_mean_does_not_depend_on_the_number_of_differences(norm: str, each: float, size: int) -> None:
    corners = torch.eye(size, dtype=torch.float64)
    assert float(ctv_norm(corners, norm, "mean")) == pytest.approx(each, rel=1e-12)
    assert float(ctv_norm(corners, norm)) == pytest.approx(each * size * (size - 1) / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_raised_to_float32(norm: str, dtype: torch.dtype) -> None:
    half = random(5, 9, 4).to(dtype).requires_grad_()
    value = ctv_norm(half, norm)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ctv_norm(half.float(), norm), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value, half)
    assert gradient.dtype == dtype
    alignment = difference_alignment_loss(half, norm=norm)
    assert alignment.dtype == torch.float32
    torch.testing.assert_close(alignment, difference_alignment_loss(half.float(), norm=norm), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_changes_nothing(norm: str) -> None:
    x, labels = random(6, 9, 4).float().requires_grad_(), torch.arange(9) % 4

    def values() -> list[Tensor]:
        return [ctv_norm(x, norm), *(difference_alignment_loss(x, labels, None, kind, norm) for kind in DIFFERENCES)]

    wanted = values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values()
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        check(mine, other.double(), x, tolerance=0)


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


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("norm", NORMS)
def test_alignment_gradcheck(norm: str, difference: str) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(
        lambda x: difference_alignment_loss(x, labels, None, difference, norm), (random(8, 5, 3).requires_grad_(),)
    )


@pytest.mark.parametrize("norm", NORMS)
def test_equidistant_classes_are_aligned_in_distance_alone(norm: str) -> None:
    corners, labels = torch.eye(4, dtype=torch.float64)[[0, 1, 1, 2, 3]], torch.tensor([0, 1, 1, 2, 3])
    assert float(difference_alignment_loss(corners, labels, norm=norm)) == pytest.approx(0, abs=1e-12)
    for difference in ("abs", "signed"):
        assert float(difference_alignment_loss(corners, labels, difference=difference, norm=norm)) > 0.5
    assert float(difference_alignment_loss(corners * torch.tensor([1.0, 2, 1, 1]), labels, norm=norm)) > 0.1


def test_of_distances_l1_and_l2_are_the_same() -> None:
    x, labels = random(9, 7, 3), torch.arange(7) % 3
    first, second = (difference_alignment_loss(x, labels, norm=norm) for norm in ("l1", "l2"))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


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


ROWS, BROKEN = torch.ones(3, 2), torch.tensor([[1.0, math.nan], [math.inf, 0.0], [0.0, 1.0]])
SAME = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ctv_norm(ROWS[0]), r"Expected `differences` to be a floating-point tensor of shape \(H, h\), but got shape"),
        (lambda: ctv_norm(ROWS.long()), "Expected `differences` .* but got dtype torch.int64"),
        (lambda: ctv_norm([[1.0]]), "Expected `differences` .* but got list"),  # type: ignore[arg-type]
        (lambda: ctv_norm(BROKEN), "Expected `differences` to be finite, but got 2 non-finite of 6 entries"),
        (lambda: ctv_norm(ROWS, "l3"), "Expected `norm` to be one of 'l1', 'l2', 'squared_l2', but got 'l3'"),
        (lambda: ctv_norm(ROWS, "squared"), "but got 'squared'. Did you mean 'squared_l2'?"),
        (lambda: ctv_norm(ROWS, reduction="none"), "Expected `reduction` to be one of 'sum', 'mean', but got 'none'"),
        (lambda: difference_alignment_loss(ROWS[0]), r"Expected `embeddings` .* of shape \(B, h\), but got shape \(2,\)"),
        (lambda: difference_alignment_loss(ROWS.int()), "Expected `embeddings` .* but got dtype torch.int32"),
        (lambda: difference_alignment_loss(BROKEN), "Expected `embeddings` to be finite, but got 2 non-finite of 6"),
        (
            lambda: difference_alignment_loss(ROWS, SAME[:2]),
            r"Expected `labels` to be a tensor of 3 class numbers, .* but got torch.int64 of shape \(2,\)",
        ),
        (lambda: difference_alignment_loss(ROWS, SAME.float()), r"but got torch.float32 of shape \(3,\)"),
        (lambda: difference_alignment_loss(ROWS, SAME[:, None]), r"but got torch.int64 of shape \(3, 1\)"),
        (lambda: difference_alignment_loss(ROWS, [0, 1, 2]), "Expected `labels` .* but got list"),  # type: ignore[arg-type]
        (
            lambda: difference_alignment_loss(ROWS, difference="distances"),
            "one of 'distance', 'abs', 'signed', but got 'distances'. Did you mean 'distance'?",
        ),
        (lambda: difference_alignment_loss(ROWS[:0], norm="l3"), "Expected `norm`"),
        (
            lambda: difference_alignment_loss(ROWS, None, torch.zeros(3, 2).long()),
            r"Expected `pairs` to be an int64 tensor of shape \(2, n\), but got torch.int64 of shape \(3, 2\)",
        ),
        (lambda: difference_alignment_loss(ROWS, None, torch.zeros(2, 3)), r"but got torch.float32 of shape \(2, 3\)"),
        (lambda: difference_alignment_loss(ROWS, None, SAME), r"Expected `pairs` .* of shape \(3,\)"),
        (lambda: difference_alignment_loss(ROWS, None, [(0, 1)]), "Expected `pairs` .* but got list"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_lengths_between_near_differences_keep_their_digits(spread: float) -> None:
    m = spread * random(0, 64, 8)
    m[:32] += 5
    x = m.float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    [found] = torch.autograd.grad(ctv_norm(x), x)
    [wanted] = torch.autograd.grad(torch.pdist(exact).sum(), exact)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    "pairs",
    [
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(2, 4, dtype=torch.uint8),
        torch.tensor([[0, 9], [1, 2]]),
        torch.tensor([[0, -1], [1, 2]]),
        torch.ones(2, 3, dtype=torch.complex64),
    ],
    ids=["bool", "uint8", "beyond", "negative", "complex"],
)
def test_pairs_that_are_no_indices(pairs: Tensor) -> None:
    with pytest.raises(NetsimError, match="`pairs` to be"):
        difference_alignment_loss(random(0, 4, 3), pairs=pairs)


def test_a_sample_and_itself_are_of_one_class_without_labels_too() -> None:
    z, pairs = random(0, 4, 3), torch.tensor([[0, 1, 2], [1, 2, 2]])
    torch.testing.assert_close(difference_alignment_loss(z, None, pairs), difference_alignment_loss(z, torch.arange(4), pairs))


def test_complex_labels() -> None:
    with pytest.raises(NetsimError, match="`labels` to be"):
        difference_alignment_loss(random(0, 3, 2), torch.ones(3, dtype=torch.complex64))
