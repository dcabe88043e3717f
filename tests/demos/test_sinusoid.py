from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_netsim.demos import SinusoidDataModule, SinusoidRegressor, sinusoid


def test_points_lie_on_the_circle_and_targets_on_the_sinusoid() -> None:
    alpha = torch.rand(50, dtype=torch.float64)
    x, y = sinusoid(alpha, frequency=3)
    for i, a in enumerate(alpha.tolist()):
        assert x[i].tolist() == pytest.approx([math.cos(2 * math.pi * a), math.sin(2 * math.pi * a)], abs=1e-12)
        assert y[i].item() == pytest.approx(math.sin(6 * math.pi * a), abs=1e-12)


def test_training_and_validation_hold_every_point_and_validation_is_in_order() -> None:
    data = SinusoidDataModule(frequency=2, num_points=300, batch_size=10)
    assert bool((data.alpha.diff() > 0).all())
    torch.testing.assert_close(SinusoidDataModule().alpha, torch.arange(2048) / 2048)
    x, y = sinusoid(data.alpha, 2)
    seen_x, seen_y = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(seen_x, x)
    assert torch.equal(seen_y, y)
    trained_on = torch.cat([points for points, _ in data.train_dataloader()])
    assert not torch.equal(trained_on, x), "shuffled"
    assert sorted(map(tuple, trained_on.tolist())) == sorted(map(tuple, x.tolist()))


def test_regressor_has_the_stated_layers_and_is_trained_on_the_mean_absolute_difference() -> None:
    model = SinusoidRegressor(num_hidden_layers=3)
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    assert widths == [64, 64, 64, 1]
    x, y = sinusoid(torch.rand(7), 1)
    torch.testing.assert_close(model.training_step((x, y), 0), (model(x) - y).abs().mean())
