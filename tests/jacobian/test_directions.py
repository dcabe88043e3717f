"""Directions of the output space: how many, which, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_netsim import NetsimError
from lightning_netsim.jacobian import Directions, JacobianOperator, per_sample_jacobian
from tests import cases, oracles
from tests.jacobian.shared import close, oracle

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
    few = chosen.project(OUTPUTS[:, :1], torch.zeros(6).long()) if kind in ("auto", "contrast") else OUTPUTS[:, :1]
    assert torch.equal(few, OUTPUTS[:, :1]), "a single output is its own contrast"


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
    everything = oracle("mlp_10")
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
    close(result.materialize(), wanted)


@pytest.mark.parametrize("directions", ["contrast", "target", "predicted"])
@pytest.mark.parametrize("name", ["mlp_10", "gru", "tied_through_function"])
def test_the_output_of_a_class_on_every_kind_of_path(name: str, directions: str) -> None:
    model, inputs = cases.build(name)
    everything = oracle(name)
    samples, outputs = everything.shape[:2]
    labels = model(inputs).argmax(1) if directions == "predicted" else torch.randint(0, outputs, (samples,))
    wanted = everything[torch.arange(samples), labels]
    if directions == "contrast":
        wanted = wanted - (everything.sum(1) - wanted) / (outputs - 1)
    operator = JacobianOperator(model, directions=directions)
    close(operator(inputs, None if directions == "predicted" else labels).materialize()[:, 0], wanted)
    paths = {operator.ownership.path(parameter).method.name for parameter in operator.ownership.parameters}
    assert paths - {"LAYER"} == {"gru": {"MODULE_LOOP"}, "tied_through_function": {"MODEL_VMAP"}}.get(name, set())


def test_contrasts_do_not_depend_on_a_common_shift() -> None:
    labels = torch.tensor([0, 9, 4, 4, 7, 1])
    found = Directions("contrast").project(OUTPUTS + 3, labels)
    wanted = torch.cat([oracles.contrast(OUTPUTS[i : i + 1], int(labels[i])) for i in range(6)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("directions", ["contrast", "target"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        *[
            (labels, r"class indices of shape \(6,\) for directions=\"\w+\", but got .*\. Choose other directions")
            for labels in (None, [0] * 6, torch.zeros(6), torch.zeros(5).long(), torch.zeros(6, 1).long())
        ],
        (torch.tensor([0, 1, 2, 3, 4, 10]), "class indices within 0 to 9, but got 0 to 10"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "class indices within 0 to 9, but got -1 to 4"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused_in_one_sentence(labels: Any, message: str, directions: str) -> None:
    with pytest.raises(NetsimError, match=f"Expected `labels` to be {message}") as caught:
        Directions(directions).project(OUTPUTS, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ("al", r"Expected `directions` to be one of 'all', 'auto', .* but got 'al'\. Did you mean 'all'\?"),
        (0, r"Expected `directions` to be a positive int, but got 0\. Or choose one of all, auto"),
        (2.0, "Expected `directions` to be a positive int"),
        (torch.ones(10), r"Expected `directions` to be a floating-point tensor of shape \(D, d\), but got shape \(10,\)"),
        (torch.ones(9, 2), r"a matrix with D = 10 rows, but got shape \(9, 2\)"),
        (11, 'at most the number of outputs, 10, but got 11. Use directions="all"'),
        (lambda outputs: outputs[:3], r"a function that returns shape \(6, d\), but got shape \(3, 10\)"),
        (lambda outputs: 1.0, r"a function that returns shape \(6, d\), but got float"),
    ],
)
def test_refusals(directions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Directions(directions).project(OUTPUTS)
