from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_netsim import NetsimError
from lightning_netsim.demos import SinusoidDataModule, SinusoidRegressor, sinusoid


def test_points_lie_on_the_circle_and_targets_on_the_sinusoid() -> None:
    alpha = torch.rand(50, dtype=torch.float64)
    x, y = sinusoid(alpha, frequency=3)
    for i, a in enumerate(alpha.tolist()):
        assert x[i].tolist() == pytest.approx([math.cos(2 * math.pi * a), math.sin(2 * math.pi * a)], abs=1e-12)
        assert y[i].item() == pytest.approx(math.sin(6 * math.pi * a), abs=1e-12)


def test_positions_are_sorted_and_evenly_spaced_for_a_power_of_two() -> None:
    data = SinusoidDataModule()
    torch.testing.assert_close(data.alpha, torch.arange(2048) / 2048)


def test_training_and_validation_hold_every_point_and_validation_is_in_order() -> None:
    data = SinusoidDataModule(frequency=2, num_points=300, batch_size=10)
    assert bool((data.alpha.diff() > 0).all())
    x, y = sinusoid(data.alpha, 2)
    seen_x, seen_y = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(seen_x, x)
    assert torch.equal(seen_y, y)
    trained_on = torch.cat([points for points, _ in data.train_dataloader()])
    assert not torch.equal(trained_on, x), "shuffled"
    assert sorted(map(tuple, trained_on.tolist())) == sorted(map(tuple, x.tolist()))


@pytest.mark.parametrize("num_hidden_layers", [1, 6])
def test_regressor_has_the_stated_layers(num_hidden_layers: int) -> None:
    model = SinusoidRegressor(num_hidden_layers=num_hidden_layers)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [module.in_features for module in linear] == [2] + [64] * num_hidden_layers
    assert linear[-1].out_features == 1
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == num_hidden_layers


def test_training_loss_is_the_mean_absolute_difference() -> None:
    model = SinusoidRegressor(num_hidden_layers=1)
    x, y = sinusoid(torch.rand(7), 1)
    torch.testing.assert_close(model.training_step((x, y), 0), (model(x) - y).abs().mean())


def test_optimizer_is_adam_at_1e_minus_4() -> None:
    optimizer = SinusoidRegressor().configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("arguments", [{"num_hidden_layers": 0}, {"width": 0}, {"learning_rate": -1.0}])
def test_regressor_refuses_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(NetsimError, match=next(iter(arguments))):
        SinusoidRegressor(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"frequency": 0}, {"num_points": 0}, {"batch_size": -1}])
def test_data_module_refuses_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(NetsimError, match=next(iter(arguments))):
        SinusoidDataModule(**arguments)
