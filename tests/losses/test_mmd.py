"""The MMD of two sets as a module: its kernels and bandwidths, its draws, and what it teaches a set to do."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import instantiate_class
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.functional import gaussian_kernel, squared_mmd
from lightning_netsim.losses import MMDLoss
from lightning_netsim.losses import mmd as room
from tests import oracles


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, wanted: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    for leaf in leaves:
        mine, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (found, wanted))
        assert float((mine - other).norm()) <= 1e-9 * float(other.norm())
        assert float(other.norm()) > 0


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


def test_features_are_redrawn_in_training_and_held_in_evaluation() -> None:
    x, y = random(11, 9, 3), random(12, 8, 3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    criterion, same = MMDLoss(num_features=16, seed=3), MMDLoss(num_features=16, seed=3)
    values = [float(criterion(x, y)) for _ in range(3)]
    assert len(set(values)) == 3
    assert [float(same(x, y)) for _ in range(3)] == values
    assert [float(criterion.eval()(x, y)) for _ in range(2)] == [values[0]] * 2
    assert float(criterion.train()(x, y)) not in values
    assert float(MMDLoss(num_features=16, seed=4)(x, y)) not in values
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the run are its own"


def test_half_precision_is_raised_and_autocast_changes_nothing() -> None:
    for arguments in ({}, {"kernel": "arc_cosine"}, {"num_features": 32}, {"num_features": 32, "unbiased": True}):
        for dtype in (torch.float16, torch.bfloat16):
            x, y = random(13, 9, 3).to(dtype).requires_grad_(), random(14, 7, 3).to(dtype)
            wanted = MMDLoss(**arguments)(x.float(), y.float())
            found = [MMDLoss(**arguments)(x, y)]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found += [MMDLoss(**arguments)(x, y), MMDLoss(**arguments)(x.float(), y.float())]
            for loss in found:
                assert loss.dtype == torch.float32
                assert torch.equal(loss, wanted)
            assert torch.autograd.grad(found[0], x)[0].dtype == dtype


@pytest.mark.parametrize("arguments", [{}, {"kernel": "arc_cosine"}, {"num_features": 128}])
def test_minimizing_it_moves_one_set_onto_the_other(arguments: dict[str, Any]) -> None:
    """Samples of one cloud come to lie as those of two, which no distance of means would ask for."""
    target = random(15, 60, 2) * 0.3 + torch.tensor([[3.0, 1.0], [-3.0, 1.0]]).double().repeat_interleave(30, 0)
    x = random(16, 60, 2).requires_grad_()
    criterion, exact = MMDLoss(**arguments), MMDLoss(arguments.get("kernel", "gaussian"))
    optimizer, before = torch.optim.Adam([x], lr=0.1), float(exact(x, target).detach())
    for _ in range(80):
        optimizer.zero_grad()
        criterion(x, target).backward()
        optimizer.step()
    assert float(exact(x, target).detach()) < 0.05 * before
    assert 20 <= int((x[:, 0] > 0).sum()) <= 40
    assert float(x[:, 0].detach().abs().mean()) > 1


def test_copies_go_on_with_the_same_draws() -> None:
    x, y, criterion = random(17, 9, 3), random(18, 8, 3), MMDLoss(num_features=12, seed=3)
    criterion(x, y)
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    wanted = [float(criterion(x, y)) for _ in range(3)]
    for other in others:
        assert [float(other(x, y)) for _ in range(3)] == wanted
    assert not criterion.state_dict()


@pytest.mark.parametrize(
    "given",
    [{}, {"bandwidths": [0.5, 2.0], "num_features": 6, "seed": 4}, {"kernel": "arc_cosine", "depth": 2, "unbiased": True}],
)
def test_its_arguments_make_it_again(given: dict[str, Any]) -> None:
    defaults = {"kernel": "gaussian", "bandwidths": None, "depth": 1, "unbiased": False, "num_features": None, "seed": 0}
    criterion = MMDLoss(**given)
    config = criterion.config()
    assert config == {"class_path": f"{room.__name__}.MMDLoss", "init_args": {**defaults, **given}}
    again = instantiate_class((), config)
    assert again.config() == config
    x, y = random(19, 9, 3), random(20, 8, 3)
    assert [float(again(x, y)) for _ in range(2)] == [float(criterion(x, y)) for _ in range(2)]
    assert f"num_features={given.get('num_features')}" in repr(criterion)


def test_bandwidths_as_one_number_or_a_list() -> None:
    x, y = random(21, 9, 3), random(22, 8, 3)
    wanted = squared_mmd(x, y, partial(gaussian_kernel, bandwidths=1.5))
    for bandwidths in (1.5, [1.5], (1.5,)):
        assert torch.equal(MMDLoss(bandwidths=bandwidths)(x, y), wanted)


ROWS, BROKEN = torch.ones(3, 2), torch.tensor([[1.0, math.nan], [math.inf, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MMDLoss("gausian"), "Expected `kernel` to be one of 'gaussian', 'arc_cosine', .* Did you mean 'gaussian'?"),
        (lambda: MMDLoss(kernel=3), "Expected `kernel` to be one of"),  # type: ignore[arg-type]
        (lambda: MMDLoss(bandwidths=[]), "Expected `bandwidths` to be one or more positive numbers"),
        (lambda: MMDLoss(bandwidths=[1.0, 0.0]), "Expected `bandwidths` to be a positive number, but got 0.0"),
        (lambda: MMDLoss(depth=0), "Expected `depth` to be a positive int"),
        (lambda: MMDLoss(num_features=5), "Expected `num_features` to be an even number"),
        (lambda: MMDLoss(num_features=0), "Expected `num_features` to be a positive int"),
        (lambda: MMDLoss("arc_cosine", num_features=8), "Expected `num_features` to be None for other kernels .* but got 8"),
        (lambda: MMDLoss(lambda x, y: x @ y.mT, num_features=8), "Expected `num_features` to be None"),
        (lambda: MMDLoss(seed=-1), "`seed` to be an int"),
        (lambda: MMDLoss()(ROWS[:0], ROWS), r"Expected `x` to be one or more samples, but got shape \(0, 2\)"),
        (lambda: MMDLoss()(ROWS, ROWS[:0]), r"Expected `y` to be one or more samples, but got shape \(0, 2\)"),
        (lambda: MMDLoss(unbiased=True)(ROWS, ROWS[:1]), "Expected `y` to be two or more samples"),
        (lambda: MMDLoss(num_features=8, unbiased=True)(ROWS[:1], ROWS), "Expected `x` to be two or more samples"),
        (lambda: MMDLoss()(BROKEN, ROWS), "Expected `x` to be finite, but got 2 non-finite of 4 entries"),
        (lambda: MMDLoss(num_features=8)(ROWS, BROKEN), "Expected `y` to be finite"),
        (lambda: MMDLoss()(ROWS, torch.ones(3, 4)), "Expected `y` to be of the same size as `x` along dimension 1"),
        (lambda: MMDLoss()(ROWS[0], ROWS), r"Expected `x` .* of shape \(N, K\)"),
        (lambda: MMDLoss()(ROWS.byte(), ROWS), "Expected `x` .* but got dtype torch.uint8"),
        (lambda: MMDLoss()(None, ROWS), "Expected `x` .* but got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_settings_of_another_kernel_are_refused() -> None:
    for settings, name in (
        ({"kernel": "arc_cosine", "bandwidths": [1.0]}, "bandwidths"),
        ({"depth": 2}, "depth"),
        ({"kernel": gaussian_kernel, "num_features": 8}, "num_features"),
    ):
        with pytest.raises(NetsimError, match=f"`{name}`"):
            MMDLoss(**settings)
