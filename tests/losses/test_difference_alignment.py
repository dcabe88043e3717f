"""The alignment of differences as a module: what it draws, what it does not depend on, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim.functional import difference_alignment_loss
from lightning_netsim.losses import DifferenceAlignmentLoss
from lightning_netsim.losses import difference_alignment as room
from tests import oracles
from tests.functional.common import check, random


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Return the pairs that are compared, one entry for each call from now on."""
    found: list[Tensor | None] = []

    def record(embeddings: Tensor, labels: Tensor, pairs: Tensor | None, *others: Any) -> Tensor:
        found.append(pairs)
        return difference_alignment_loss(embeddings, labels, pairs, *others)

    monkeypatch.setattr(room, "difference_alignment_loss", record)
    return found


def links(pairs: Tensor | None) -> list[tuple[int, int]]:
    assert pairs is not None
    return [(int(i), int(j)) for i, j in pairs.T]


@pytest.mark.parametrize("number", [2, 5, 19, None])
def test_a_chain_visits_each_sample_once(number: int | None, drawn: list[Tensor | None]) -> None:
    DifferenceAlignmentLoss(num_differences=number)(random(0, 20, 3))
    chain = links(drawn[0])
    assert len(chain) == (number or 19)
    assert [j for _, j in chain[:-1]] == [i for i, _ in chain[1:]]
    assert len({chain[0][0], *(j for _, j in chain)}) == len(chain) + 1


@pytest.mark.parametrize("number", [2, 7, 14])
def test_so_many_of_all_pairs(number: int, drawn: list[Tensor | None]) -> None:
    DifferenceAlignmentLoss(pairs="all", num_differences=number)(random(0, 6, 3))
    chosen = {frozenset(pair) for pair in links(drawn[0])}
    assert len(chosen) == len(links(drawn[0])) == number
    assert all(len(pair) == 2 and max(pair) < 6 for pair in chosen)


@pytest.mark.parametrize("norm", ["l1", "l2", "squared_l2"])
@pytest.mark.parametrize("difference", ["distance", "abs", "signed"])
def test_all_pairs_against_the_loop(difference: str, norm: str) -> None:
    x, labels = random(2, 7, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, -1, 1, 3])
    pairs = [(i, j) for i in range(7) for j in range(i + 1, 7)]
    unit = x / x.square().sum(1, keepdim=True).sqrt()
    for normalize, embeddings in ((True, unit), (False, x)):
        wanted = oracles.difference_alignment(embeddings, labels, pairs, difference, norm)
        found = DifferenceAlignmentLoss(difference, norm, pairs="all", normalize=normalize)(x, labels)
        check(found, wanted, x)


@pytest.mark.parametrize("number", [3, 10])
@pytest.mark.parametrize("norm", ["l2", "squared_l2"])
@pytest.mark.parametrize("difference", ["distance", "signed"])
def test_some_of_all_pairs_estimate_without_bias(difference: str, norm: str, number: int) -> None:
    x = random(3, 8, 3)
    wanted = float(DifferenceAlignmentLoss(difference, norm, pairs="all")(x))
    criterion = DifferenceAlignmentLoss(difference, norm, pairs="all", num_differences=number)
    draws = torch.stack([criterion(x) for _ in range(600)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert 0 < error < 0.05 * wanted
    assert abs(float(draws.mean()) - wanted) < 4 * error


def test_the_size_of_each_embedding_does_not_count() -> None:
    full, x = DifferenceAlignmentLoss(pairs="all"), random(4, 6, 3)
    scales = torch.tensor([1e-6, 0.3, 1.0, 2.0, 50.0, 1e6]).double()[:, None]
    for difference in ("distance", "abs", "signed"):
        values = [DifferenceAlignmentLoss(difference)(embeddings) for embeddings in (x, scales * x)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=0)
    for size in (1e-22, 1e20):  # Their squares leave the range of float32.
        torch.testing.assert_close(full(x.float() * size), full(x.float()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_of_zero_have_a_finite_gradient(dtype: torch.dtype) -> None:
    for difference in ("distance", "abs", "signed"):
        for norm in ("l1", "l2", "squared_l2"):
            x = torch.zeros(6, 3, dtype=dtype)
            x[4:] = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])
            x.requires_grad_()
            loss = DifferenceAlignmentLoss(difference, norm, pairs="all")(x)
            assert loss.dtype == torch.float32
            loss.backward()
            assert x.grad is not None
            assert bool(torch.isfinite(x.grad).all())
            assert bool(x.grad[4:].any())


NOTHING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "no sample": lambda x: (x[:0], None),
    "one sample": lambda x: (x[:1], None),
    "two samples": lambda x: (x[:2], None),
    "one class": lambda x: (x, torch.full((5,), 3)),
    "no label": lambda x: (x, torch.full((5,), -1)),
    "two labels": lambda x: (x, torch.tensor([-1, 0, -1, 1, -1])),
}


@pytest.mark.parametrize("arguments", [{}, {"pairs": "all"}, {"pairs": "all", "num_differences": 3}, {"num_differences": 3}])
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_be_compared_there_is_a_zero_with_a_graph(name: str, arguments: dict[str, Any]) -> None:
    x = random(6, 5, 3).requires_grad_()
    loss = DifferenceAlignmentLoss(**arguments)(*NOTHING[name](x))
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_few_of_very_many_pairs_estimate_without_bias() -> None:
    z, labels = random(0, 60, 3), torch.arange(60) % 7 // 2  # Of about 1,300 pairs between classes.
    wanted = float(DifferenceAlignmentLoss(norm="l2", pairs="all")(z, labels))
    criterion = DifferenceAlignmentLoss(norm="l2", pairs="all", num_differences=20)
    draws = torch.stack([criterion(z, labels) for _ in range(600)])
    assert abs(float(draws.mean()) - wanted) < 4 * float(draws.std()) / 600**0.5
    for _ in range(20):
        pairs = criterion._draw(labels)
        assert pairs is not None
        first, second = pairs
        assert bool((labels[first] != labels[second]).all())
        assert len({(a, b) for a, b in pairs.T.tolist()}) == 20
        assert bool((first < second).all())
