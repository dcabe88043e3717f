"""The MMD of two sets as a module: its kernels and bandwidths, its draws, and what it teaches a set to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_netsim.losses import MMDLoss
from tests import oracles
from tests.functional.common import check, random

SETTINGS: dict[str, tuple[dict[str, Any], oracles.PairKernel]] = {
    "one bandwidth": ({"bandwidths": 0.8}, oracles.gaussian([0.8])),
    "several": ({"bandwidths": [0.5, 2.0]}, oracles.gaussian([0.5, 2.0])),
    "arc-cosine": ({"kernel": "arc_cosine"}, oracles.arc_cosine_of_pair(1)),
    "deep": ({"kernel": "arc_cosine", "depth": 3}, oracles.arc_cosine_of_pair(3)),
    "own": ({"kernel": lambda x, y: (1 + x @ y.mT) ** 2}, lambda p, q: (1 + (p * q).sum()) ** 2),
}


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_loop(name: str, unbiased: bool) -> None:
    x, y = random(0, 7, 3).requires_grad_(), (random(1, 5, 3) + 0.5).requires_grad_()
    arguments, kernel = SETTINGS[name]
    check(MMDLoss(unbiased=unbiased, **arguments)(x, y), oracles.squared_mmd(x, y, kernel, unbiased), x, y)


@pytest.mark.parametrize("unbiased", [False, True])
def test_bandwidths_of_its_own_are_multiples_of_the_median_that_do_not_move(unbiased: bool) -> None:
    x, y = (3 * random(2, 8, 4)).requires_grad_(), (3 * random(3, 6, 4) + 2).requires_grad_()
    pooled = torch.cat([x, y]).detach()
    lengths = sorted(float((p - q).norm()) for i, p in enumerate(pooled) for q in pooled[:i])
    middle = lengths[(len(lengths) - 1) // 2]
    kernel = oracles.gaussian([middle * scale for scale in (0.25, 0.5, 1, 2, 4)])
    check(MMDLoss(unbiased=unbiased)(x, y), oracles.squared_mmd(x, y, kernel, unbiased), x, y)


def test_the_unit_of_the_samples_does_not_count() -> None:
    x, y = random(4, 20, 4), random(5, 20, 4) + 1
    for size in (1e-6, 1e6):
        torch.testing.assert_close(MMDLoss()(size * x, size * y), MMDLoss()(x, y), rtol=1e-9, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"bandwidths": 1.0}, {"kernel": "arc_cosine", "depth": 2}, {"num_features": 64}])
def test_equal_sets_give_exactly_zero_and_unequal_ones_more(arguments: dict[str, Any]) -> None:
    criterion = MMDLoss(**arguments)
    for size in (1, 2, 50):
        x = random(6, size, 5).float()
        for other in (x, x.clone(), x.mT.contiguous().mT):
            assert float(criterion(x, other)) == 0
    assert float(criterion(random(7, 50, 5), random(8, 50, 5) + 1)) > 0.01
    same = torch.ones(6, 3)
    x = same.clone().requires_grad_()
    loss = criterion(x, same)
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, x)[0].abs().gt(1e-6).any()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bandwidths", [None, [0.7, 2.0]])
def test_random_features_estimate_the_exact_one_in_the_mean(bandwidths: list[float] | None, unbiased: bool) -> None:
    x, y = random(9, 30, 3), random(10, 20, 3) + 0.5
    wanted = float(MMDLoss(bandwidths=bandwidths, unbiased=unbiased)(x, y))
    criterion = MMDLoss(bandwidths=bandwidths, unbiased=unbiased, num_features=80)
    draws = torch.stack([criterion(x, y) for _ in range(250)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert 0 < error < 0.05 * wanted
    assert abs(float(draws.mean()) - wanted) < 4 * error
