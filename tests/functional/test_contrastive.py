"""The contrastive loss: against a loop over pairs, against pytorch-metric-learning, and where nothing is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_netsim.functional import contrastive_loss
from tests import oracles
from tests.functional.common import check, random


def classes(seed: int, size: int, low: int = 0, high: int = 4) -> Tensor:
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("margin", [1.0, 4.0, 100.0])
@pytest.mark.parametrize("seed", range(2))
def test_against_the_loop(seed: int, margin: float) -> None:
    x, labels = random(seed, 12, 3).requires_grad_(), classes(seed, 12, low=-1)
    assert bool((labels < 0).any())
    wanted = oracles.contrastive(x, labels, margin)
    assert float(wanted.detach()) > 0
    check(contrastive_loss(x, labels, margin), wanted, x)


def test_samples_without_a_label_are_left_out() -> None:
    x, labels = random(1, 10, 3).requires_grad_(), torch.tensor([0, 1, -1, 0, 2, -2, 1, -1, 0, 2])
    known = labels >= 0
    found = contrastive_loss(x, labels, 5.0)
    check(found, contrastive_loss(x[known], labels[known], 5.0), x)
    assert not torch.autograd.grad(contrastive_loss(x, labels, 5.0), x)[0][~known].any()


def test_a_large_constant_does_not_cost_digits() -> None:
    x, labels = (random(2, 12, 3) + 1e3).float().requires_grad_(), classes(2, 12)
    exact = x.detach().double().requires_grad_()
    check(contrastive_loss(x, labels, 3.0), oracles.contrastive(exact, labels, 3.0), x, exact=exact, tolerance=1e-5)


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


def test_equal_embeddings_have_no_loss_and_are_not_counted() -> None:
    z, labels = random(2, 4, 5)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 0, 1, 0])
    check(contrastive_loss(z.requires_grad_(), labels), oracles.contrastive(z, labels, 1.0), z)
