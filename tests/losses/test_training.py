"""Criteria do what they say when they are minimized: pairs become the same thing, densities reach what is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.functional import pairwise_similarity
from lightning_netsim.functional.similarity import tangent_loss
from lightning_netsim.jacobian import JacobianOperator, per_sample_jacobian
from lightning_netsim.losses import (
    AbstractSimilarityLoss,
    DensityLoss,
    GradientBatch,
    GroupSimilarityLoss,
    PairSimilarityLoss,
    TangentLoss,
)


def image_network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.PReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.PReLU(), nn.Linear(8, outputs)
    )


def minimize(
    criterion: AbstractSimilarityLoss,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None,
    steps: int,
    lr: float,
    directions: object = "all",
) -> list[float]:
    """Return the criterion before each step of Adam on a fixed batch, and nothing else is minimized."""
    operator = JacobianOperator(model, directions=directions, create_graph=True)  # type: ignore[arg-type]
    optimizer, values = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(steps):
        loss = criterion(GradientBatch(operator, inputs, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    return values


def similarity(model: nn.Module, inputs: Tensor) -> Tensor:
    return pairwise_similarity(per_sample_jacobian(model.double(), inputs.double()).materialize().detach())


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_pair_becomes_the_same_thing(outputs: int) -> None:
    torch.manual_seed(0)
    model, inputs = image_network(outputs), torch.randn(2, 1, 8, 8)
    before = float(similarity(model, inputs)[0, 1])
    values = minimize(PairSimilarityLoss(), model.float(), inputs, torch.zeros(2).long(), steps=80, lr=0.02)
    assert values[0] == pytest.approx(-before, abs=1e-4)
    assert before < 0.9
    assert float(similarity(model, inputs)[0, 1]) > 0.99


def test_a_group_becomes_more_alike_and_the_rest_is_not_asked_for() -> None:
    torch.manual_seed(0)
    model, inputs, labels = image_network(3), torch.randn(9, 1, 8, 8), torch.tensor([0, 1, 2] * 3)
    values = minimize(GroupSimilarityLoss(), model, inputs, labels, steps=40, lr=0.02)
    assert 1 + values[-1] < 0.4 * (1 + values[0])


@pytest.mark.parametrize("target", [0.25, 0.8])
def test_densities_reach_what_is_asked_for(target: float) -> None:
    torch.manual_seed(0)
    model, inputs = image_network(3), torch.randn(8, 1, 8, 8)
    before = float(similarity(model, inputs).mean())
    minimize(DensityLoss(target), model.float(), inputs, None, steps=80, lr=0.02)
    assert abs(before - target) > 0.05 * target
    assert float(similarity(model, inputs).mean()) == pytest.approx(target, rel=0.05)


def test_gradients_stop_moving_along_a_direction() -> None:
    torch.manual_seed(0)
    model, inputs = image_network(2), torch.randn(4, 1, 8, 8)

    def change() -> float:
        moved = (per_sample_jacobian(model, inputs + sign * 1e-2).materialize() for sign in (1, -1))
        ahead, behind = moved
        return float(tangent_loss((ahead - behind) / 2e-2))

    before = change()
    values = minimize(TangentLoss(torch.ones_like), model, inputs, None, steps=40, lr=0.02)
    assert values[-1] < 0.5 * values[0]
    assert change() < 0.6 * before
