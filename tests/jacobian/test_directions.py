"""Directions of the output space: how many, which, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_netsim import NetsimError
from lightning_netsim.jacobian import Directions, JacobianOperator, per_sample_jacobian
from tests import cases, oracles

OUTPUTS = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("directions", "kind", "count"),
    [
        ("all", "all", 10),
        ("auto", "auto", 4),
        (3, "random", 3),
        (torch.eye(10)[:, :2], "matrix", 2),
        ("contrast", "contrast", 1),
        ("predicted", "predicted", 1),
        ("target", "target", 1),
        (torch.tanh, "function", None),
    ],
)
def test_how_many(directions: Any, kind: str, count: int | None) -> None:
    chosen = Directions(directions)
    assert (chosen.kind, chosen.count(10)) == (kind, count)
    assert repr(chosen) == f"Directions({kind})"
    projected = chosen.project(OUTPUTS, torch.arange(6))
    assert projected.shape == (6, 10 if count is None else count)


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_auto_is_all_of_few_outputs(outputs: int) -> None:
    few = OUTPUTS[:, :outputs]
    assert Directions("auto").project(few) is few
    assert Directions("auto").count(outputs) == outputs


@pytest.mark.parametrize("directions", [1, 4, 10, "auto"])
def test_random_directions_are_orthonormal_and_fixed_by_the_seed(directions: int | str) -> None:
    matrix = Directions(directions, seed=7).matrix(10)
    assert matrix is not None
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = Directions(directions, seed=7).matrix(10)
    assert torch.equal(matrix, again)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(matrix, Directions(directions, seed=8).matrix(10))


def test_the_kernel_is_that_of_the_projected_outputs() -> None:
    model, inputs = cases.build("mlp_10")
    model, inputs = model.double(), inputs.double()
    everything = oracles.loop_jacobian(model, inputs)
    for directions in (3, torch.randn(10, 5, dtype=torch.float64)):
        matrix = Directions(directions, 4).matrix(10)
        assert matrix is not None
        result = per_sample_jacobian(model, inputs, directions, seed=4)
        torch.testing.assert_close(result.materialize(), matrix.mT @ everything, rtol=0, atol=1e-12)
    # The full kernel does not care for an orthogonal change of the outputs.
    full = per_sample_jacobian(model, inputs, 10).gram().diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(full, everything.square().sum((1, 2)))


def test_a_function_of_the_outputs() -> None:
    model, inputs = cases.build("mlp_2")
    result = per_sample_jacobian(model, inputs, lambda outputs: outputs.softmax(1)[:, :1])
    wanted = oracles.loop_jacobian(model, inputs, forward=lambda m, x: m(x).softmax(1)[:, :1])
    torch.testing.assert_close(result.materialize().double(), wanted, rtol=0, atol=1e-6)


def test_predicted_and_target_classes() -> None:
    model, inputs = cases.build("mlp_10")
    everything = oracles.loop_jacobian(model, inputs)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    predicted = model(inputs).argmax(1)
    rows = torch.arange(7)
    found = per_sample_jacobian(model, inputs, "predicted").materialize()[:, 0]
    torch.testing.assert_close(found.double(), everything[rows, predicted], rtol=0, atol=1e-6)
    operator = JacobianOperator(model, directions="target")
    found = operator(inputs, labels).materialize()[:, 0]
    torch.testing.assert_close(found.double(), everything[rows, labels], rtol=0, atol=1e-6)


def test_contrasts_with_the_mean_of_the_other_outputs() -> None:
    model, inputs = cases.build("mlp_10")
    everything, labels = oracles.loop_jacobian(model, inputs), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    found = JacobianOperator(model, directions="contrast")(inputs, labels).materialize()[:, 0]
    wanted = torch.stack(
        [jacobian[y] - (jacobian.sum(0) - jacobian[y]) / 9 for jacobian, y in zip(everything, labels, strict=True)]
    )
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    # Within one class it is the same function for every sample: a matrix.
    matrix = torch.full((10, 1), -1 / 9)
    matrix[4] = 1
    same = JacobianOperator(model, directions="contrast")(inputs, torch.full((7,), 4))
    torch.testing.assert_close(same.materialize(), JacobianOperator(model, directions=matrix)(inputs).materialize())


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_contrasts_do_not_depend_on_a_common_shift(shift: float) -> None:
    labels = torch.tensor([0, 9, 4, 4, 7, 1])
    found = Directions("contrast").project(OUTPUTS + shift, labels)
    wanted = torch.cat([oracles.contrast(OUTPUTS[i : i + 1], int(labels[i])) for i in range(6)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_contrast_of_a_single_output_is_that_output() -> None:
    outputs = OUTPUTS[:, :1]
    assert torch.equal(Directions("contrast").project(outputs, torch.zeros(6).long()), outputs)


@pytest.mark.parametrize("labels", [None, [0] * 6, torch.zeros(6), torch.zeros(5).long(), torch.zeros(6, 1).long()])
def test_contrasts_without_class_indices_are_refused(labels: Any) -> None:
    message = (
        r'Expected `labels` to be class indices of shape \(6,\) for directions="contrast", but got .*\. Choose other directions'
    )
    with pytest.raises(ValueError, match=message):
        Directions("contrast").project(OUTPUTS, labels)


@pytest.mark.parametrize("directions", ["contrast", "target"])
@pytest.mark.parametrize("label", [10, -1])
def test_a_class_that_no_output_stands_for_is_refused_in_one_sentence(directions: str, label: int) -> None:
    with pytest.raises(NetsimError, match="Expected `labels` to be") as caught:
        Directions(directions).project(OUTPUTS, torch.tensor([0, 1, 2, 3, 4, label]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("directions", ["contrast", "target"])
@pytest.mark.parametrize("name", ["gru", "tied_through_function"])
def test_target_classes_on_the_paths_without_factors(name: str, directions: str) -> None:
    model, inputs = cases.build(name)
    labels = torch.tensor([1, 0, 1, 1, 0])
    operator = JacobianOperator(model, directions=directions)
    everything = oracles.loop_jacobian(model, inputs)
    wanted = everything[torch.arange(5), labels]
    if directions == "contrast":
        wanted = wanted - (everything.sum(1) - wanted) / (everything.shape[1] - 1)
    torch.testing.assert_close(operator(inputs, labels).materialize()[:, 0].double(), wanted, rtol=0, atol=1e-5)
    last = {operator.ownership.path(parameter).method.name for parameter in operator.ownership.parameters}
    assert last & {"MODULE_LOOP", "MODEL_VMAP"}


def _wrong_batch(outputs: Tensor) -> Tensor:
    return outputs[:3]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ("al", r"Expected `directions` to be one of 'all', 'auto', .* but got 'al'\. Did you mean 'all'\?"),
        (0, r"Expected `directions` to be a positive int, but got 0\. Or choose one of all, auto"),
        (True, "Expected `directions` to be a positive int, but got True"),
        (2.0, "Expected `directions` to be a positive int"),
        (torch.ones(10), r"Expected `directions` to be a floating-point tensor of shape \(D, d\), but got shape \(10,\)"),
        (torch.ones(10, 2).long(), "Expected `directions` to be a floating-point tensor"),
        (torch.ones(9, 2), r"a matrix with D = 10 rows, but got shape \(9, 2\)"),
        (11, 'at most the number of outputs, 10, but got 11. Use directions="all"'),
        ("target", r'Expected `labels` to be class indices of shape \(6,\) for directions="target", but got NoneType'),
        (_wrong_batch, r"a function that returns shape \(6, d\), but got shape \(3, 10\)"),
        (lambda outputs: 1.0, r"a function that returns shape \(6, d\), but got float"),
        (lambda outputs: outputs[:, 0], r"a function that returns shape \(6, d\), but got shape \(6,\)"),
    ],
)
def test_refusals(directions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Directions(directions).project(OUTPUTS)
