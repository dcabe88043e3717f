"""The contrastive loss: against a loop over pairs, against pytorch-metric-learning, and where nothing is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.functional import contrastive_loss
from tests import oracles


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(seed: int, size: int, low: int = 0, high: int = 4) -> Tensor:
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, wanted: Tensor, *leaves: Tensor, tolerance: float = 1e-12) -> None:
    """Hold the value, and the gradient by `leaves[0]` to that by `leaves[-1]`, relative to the larger of 1 and its size."""
    mine, other = (torch.autograd.grad(value, x)[0].double() for value, x in ((found, leaves[0]), (wanted, leaves[-1])))
    for one, two in ((found.detach().double(), wanted.detach()), (mine, other)):
        assert float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


def peer(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    distance = LpDistance(normalize_embeddings=False, power=2)
    return ContrastiveLoss(pos_margin=0, neg_margin=margin, distance=distance)(embeddings, labels) / 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 40), margin=st.floats(0.1, 20), shift=st.floats(-3, 3))
def test_it_is_half_of_the_other_library(seed: int, size: int, margin: float, shift: float) -> None:
    x, labels = (random(seed, size, 5) + shift).requires_grad_(), classes(seed, size)
    check(contrastive_loss(x, labels, margin), peer(x, labels, margin), x)


@pytest.mark.parametrize("margin", [0.5, 4.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_against_the_loop(seed: int, margin: float) -> None:
    x, labels = random(seed, 12, 3).requires_grad_(), classes(seed, 12, low=-1)
    assert bool((labels < 0).any())
    wanted = oracles.contrastive(x, labels, margin)
    assert float(wanted.detach()) > 0
    check(contrastive_loss(x, labels, margin), wanted, x)


def test_the_margin_is_one_unless_told() -> None:
    x, labels = random(0, 8, 2), torch.arange(8) % 3
    torch.testing.assert_close(contrastive_loss(x, labels), oracles.contrastive(x, labels, 1.0), rtol=1e-12, atol=0)


def test_samples_without_a_label_are_left_out() -> None:
    x, labels = random(1, 10, 3).requires_grad_(), torch.tensor([0, 1, -1, 0, 2, -2, 1, -1, 0, 2])
    known = labels >= 0
    found = contrastive_loss(x, labels, 5.0)
    check(found, contrastive_loss(x[known], labels[known], 5.0), x)
    assert not torch.autograd.grad(contrastive_loss(x, labels, 5.0), x)[0][~known].any()


def test_a_large_constant_does_not_cost_digits() -> None:
    x, labels = (random(2, 12, 3) + 1e3).float().requires_grad_(), classes(2, 12)
    exact = x.detach().double().requires_grad_()
    check(contrastive_loss(x, labels, 3.0), oracles.contrastive(exact, labels, 3.0), x, exact, tolerance=1e-5)


def test_pairs_beyond_the_margin_do_not_dilute() -> None:
    near, far = torch.tensor([[0.0], [0.5]]).double(), torch.tensor([[10.0], [20.0], [30.0]]).double()
    alone = contrastive_loss(near, torch.tensor([0, 1]))
    assert float(alone) == pytest.approx((1 - 0.25) / 2)
    torch.testing.assert_close(contrastive_loss(torch.cat([near, far]), torch.arange(5)), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed: int) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, labels, 3.0), (random(seed, 5, 3).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype) -> None:
    half, labels = random(3, 9, 4).to(dtype).requires_grad_(), torch.arange(9) % 3
    value = contrastive_loss(half, labels, 4.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, contrastive_loss(half.float(), labels, 4.0), rtol=0, atol=0)
    assert torch.autograd.grad(value, half)[0].dtype == dtype


def test_autocast_changes_nothing() -> None:
    x, labels = random(4, 9, 4).float().requires_grad_(), torch.arange(9) % 3
    wanted = contrastive_loss(x, labels, 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_loss(x, labels, 4.0)
    assert found.dtype == torch.float32
    check(found, wanted.double(), x, tolerance=0)


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "no sample": lambda x: contrastive_loss(x[:0], torch.zeros(0).long()),
    "one sample": lambda x: contrastive_loss(x[:1], torch.zeros(1).long()),
    "no label": lambda x: contrastive_loss(x, torch.full((4,), -1)),
    "one label": lambda x: contrastive_loss(x, torch.tensor([-1, 3, -1, -2])),
    "beyond the margin": lambda x: contrastive_loss(x + torch.arange(4)[:, None] * 100, torch.arange(4)),
    "all equal": lambda x: contrastive_loss(x * 0, torch.zeros(4).long()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_no_pair_has_a_loss_there_is_a_zero_with_a_graph(name: str) -> None:
    x = random(5, 4, 3).requires_grad_()
    loss = NOTHING[name](x)
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_batch_of_one_class_is_pulled_together() -> None:
    x, labels = random(6, 6, 2).requires_grad_(), torch.full((6,), 4)
    squares = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    check(contrastive_loss(x, labels), squares.sum() / 30 / 2, x)


ROWS, LABELS = torch.ones(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(ROWS[0], LABELS), r"Expected `embeddings` .* of shape \(B, h\), but got shape \(2,\)"),
        (lambda: contrastive_loss(ROWS.long(), LABELS), "Expected `embeddings` .* but got dtype torch.int64"),
        (lambda: contrastive_loss(ROWS * math.nan, LABELS), "to be finite, but got 6 non-finite of 6 entries"),
        (lambda: contrastive_loss(ROWS, LABELS[:2]), r"of 3 class numbers, .* but got torch.int64 of shape \(2,\)"),
        (lambda: contrastive_loss(ROWS, LABELS.float()), r"but got torch.float32 of shape \(3,\)"),
        (lambda: contrastive_loss(ROWS, [0, 1, 2]), "Expected `labels` .* but got list"),  # type: ignore[arg-type]
        (lambda: contrastive_loss(ROWS, LABELS, 0.0), "Expected `margin` to be a positive number, but got 0.0"),
        (lambda: contrastive_loss(ROWS, LABELS, math.inf), "Expected `margin` to be a positive number, but got inf"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_equal_embeddings_have_no_loss_and_are_not_counted() -> None:
    z, labels = random(2, 4, 5)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 0, 1, 0])
    check(contrastive_loss(z.requires_grad_(), labels), peer(z, labels, 1.0), z)
