"""The derivative of the per-sample Jacobian as the inputs move: against finite differences, and against double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim import NetsimError
from lightning_netsim.data.trees import map_leaves, tensors
from lightning_netsim.jacobian import JacobianOperator
from tests import cases, oracles
from tests.jacobian.shared import SMALL, build, close

#: Cases whose inputs can move.
MOVING = [name for name in SMALL if "embedding" not in name and name != "tied_through_function"]
STEP = 1e-6


def random_direction(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    return map_leaves(lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator), inputs)


def moved(inputs: Any, direction: Any, step: float) -> Any:
    steps = iter(tensors(direction))
    return map_leaves(lambda x: x + step * next(steps), inputs)


def central_difference(model: nn.Module, inputs: Any, direction: Any) -> Tensor:
    """Return (G(x + hd) − G(x − hd))/2h."""
    ahead, behind = (oracles.loop_jacobian(model, moved(inputs, direction, step)) for step in (STEP, -STEP))
    return (ahead - behind) / (2 * STEP)


OFF_THE_GRAPH = ["mlp_2", "conv2d", "transposed2d", "batch_norm", "gru", "attention", "shared_parameter"]


@pytest.mark.parametrize(("name", "create_graph"), [*((n, True) for n in MOVING), *((n, False) for n in OFF_THE_GRAPH)])
def test_every_case_against_a_finite_difference(name: str, create_graph: bool) -> None:
    model, inputs = build(name)
    direction = random_direction(inputs)
    operator = JacobianOperator(model, create_graph=create_graph)
    result = operator.tangent(inputs, direction)
    wanted = central_difference(model, inputs, direction)
    close(result.materialize().detach(), wanted, 1e-5)
    close(result.gram().detach(), wanted @ wanted.mT, 1e-5)
    assert result.shapes == operator.shapes


def test_the_outputs_are_the_derivative_of_the_outputs() -> None:
    model, inputs = build("mlp_2")
    direction = random_direction(inputs)
    found = JacobianOperator(model, create_graph=True).tangent(inputs, direction).outputs.detach()
    wanted = torch.func.jvp(model, (inputs,), (direction,))[1]
    close(found, wanted.detach(), 1e-12)


class Pair(nn.Module):
    """Two inputs, and a mask of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor, chosen: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) * self.right(b)) * chosen)


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_tuples_move_in_every_floating_point_tensor(whole_numbers: bool) -> None:
    model = Pair().double()
    chosen = torch.tensor([[1, 0, 1, 1]]).repeat(5, 1)
    (a, b), (move_a, move_b) = ((torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(2))
    direction = (move_a, move_b, chosen) if whole_numbers else (move_a, move_b)
    found = JacobianOperator(model, create_graph=True).tangent((a, b, chosen), direction).materialize()
    wanted = central_difference(model, (a, b, chosen), (move_a, move_b, 0 * chosen))
    close(found.detach(), wanted, 1e-5)


def test_mappings_are_matched_by_key() -> None:
    model, (a, b) = nn.Bilinear(3, 3, 2).double(), torch.randn(2, 5, 3).double().unbind()
    runner = JacobianOperator(model, forward=lambda batch: model(batch["a"], batch["b"]), create_graph=True)
    move = {"a": torch.randn(5, 3).double(), "b": torch.zeros(5, 3).double()}
    wanted = runner.tangent({"a": a, "b": b}, move).materialize().detach()
    found = runner.tangent({"a": a, "b": b}, {"b": move["b"], "a": move["a"]}).materialize()
    assert wanted.any()
    close(found.detach(), wanted, 1e-12)


@pytest.mark.parametrize("name", MOVING)
def test_the_derivative_by_the_parameters_against_a_finite_difference(name: str) -> None:
    """Whatever has a tangent either has the right derivative, or is refused in one sentence."""
    model, inputs = build(name)
    parameters, direction = [p for p in model.parameters() if p.requires_grad], random_direction(inputs)
    operator = JacobianOperator(model, create_graph=True)

    def energy() -> Tensor:
        return operator.tangent(inputs, direction).gram().diagonal(dim1=1, dim2=2).sum()

    total = energy()
    # Where nothing but the last layer can be trained, its gradients do not depend on the weights.
    nothing: tuple[None, ...] = (None,) * len(parameters)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else nothing
    steps = [torch.randn_like(parameter) for parameter in parameters]
    found = sum(float((g * step).sum()) for g, step in zip(gradients, steps, strict=True) if g is not None)
    values = []
    for sign in (1, -2, 1):  # Ahead, behind, and back.
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter += sign * STEP * step
        values.append(float(energy().detach()))
    assert found == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("directions", [1, "contrast", "target"])
def test_directions(directions: int | str) -> None:
    (model, inputs), labels = build("mlp_10"), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    direction = random_direction(inputs)
    operator = JacobianOperator(model, directions=directions, seed=3, create_graph=True)
    matrix = operator.directions.matrix(10)
    project: Any = {"contrast": oracles.contrast, "target": oracles.target}.get(
        str(directions), lambda outputs, _: outputs @ matrix
    )
    wanted = oracles.tangent_jacobian(model, inputs, direction, labels, project)
    close(operator.tangent(inputs, direction, labels).materialize().detach(), wanted.detach(), 1e-10)


def test_chosen_parameters_and_a_direction_of_zeros() -> None:
    model, inputs = cases.build("mlp_2")
    operator = JacobianOperator(model.double(), parameters="2", create_graph=True)
    still = operator.tangent(inputs.double(), torch.zeros(inputs.shape))
    assert list(still.shapes) == ["2.weight", "2.bias"]
    assert still.materialize().dtype == torch.float64, "the direction takes the precision of the inputs"
    assert not still.materialize().any()


def test_under_no_grad_and_inference_mode() -> None:
    model, inputs = cases.build("conv2d")
    operator = JacobianOperator(model, create_graph=True)
    wanted = operator.tangent(inputs, torch.ones_like(inputs)).materialize()
    assert wanted.any()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(operator.tangent(inputs, torch.ones_like(inputs)).materialize(), wanted)


@pytest.mark.parametrize(
    ("direction", "got"),
    [
        (torch.ones(7, 3), r"torch\.float32 \(7, 3\)"),
        (torch.ones(7, 4).long(), r"torch\.int64 \(7, 4\)"),
        (None, "NoneType"),
        ((torch.ones(7, 4), torch.ones(7, 4)), "tuple"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(direction: Any, got: str) -> None:
    model, inputs = cases.build("mlp_2")
    message = (
        rf"Expected `direction` to be a floating-point tensor of shape \(7, 4\) where the inputs have one, but got {got}\."
    )
    with pytest.raises(NetsimError, match=message):
        JacobianOperator(model).tangent(inputs, direction)
