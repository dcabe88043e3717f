"""Every method of the per-sample Jacobian, on every case, against a loop over samples in float64."""

from __future__ import annotations

import pytest
import torch

from lightning_netsim.jacobian import JacobianOperator, per_sample_jacobian
from tests import cases, oracles
from tests.jacobian.shared import build, check_methods, close, jacobian, oracle

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


# A large case in float64 says no more than the small ones.
PAIRS = [
    pytest.param(name, dtype, marks=pytest.mark.slow if name in cases.LARGE and dtype == torch.float64 else ())
    for name in cases.CASES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_every_method_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    check_methods(jacobian(name, dtype), oracle(name), DTYPES[dtype])


@pytest.mark.parametrize("name", ["mlp_2", "conv2d_depthwise", "embedding", "transposed2d", "called_twice"])
def test_some_samples_in_another_precision(name: str) -> None:
    result, wanted = jacobian(name, torch.float32), oracle(name)
    chosen = result.select(torch.tensor([2, 0])).to(torch.float64)
    assert chosen.num_samples == 2
    assert chosen.gram().dtype == torch.float64
    close(chosen.gram(), (wanted @ wanted.mT)[[2, 0]])
    close(result.select(torch.arange(len(wanted)) == 1).materialize(), wanted[1:2])
    for groups in ([torch.tensor([2]), torch.tensor([0, 3, 1])], [torch.arange(2), torch.arange(2, len(wanted))]):
        for part, rows in zip(result.split(groups), groups, strict=True):
            close(part.materialize(), wanted[rows])
            assert torch.equal(part.outputs, result.outputs[rows])


@pytest.mark.parametrize("name", ["mlp_2", "embedding", "called_twice", "tied_through_function"])
def test_only_some_of_the_parameters(name: str) -> None:
    result, model = jacobian(name), cases.build(name)[0]
    names = list(result.shapes)
    for chosen in ([names[-1]], names[::-2], names):
        part = result.only(iter(chosen))
        wanted = oracles.loop_jacobian(*cases.build(name), parameters=chosen)
        assert list(part.shapes) == chosen
        assert part.num_parameters == sum(model.get_parameter(key).numel() for key in chosen)
        close(part.materialize(), wanted, 1e-10)
        close(part.gram(), wanted @ wanted.mT, 1e-10)
    for wrong in (["2.weigth"], ["0.weight", "nothing"], "0.weight"):
        with pytest.raises(ValueError, match="Expected `names` to be"):
            result.only(wrong)


def test_a_parameter_that_no_output_depends_on_is_zero() -> None:
    part = jacobian("unused_and_frozen").only(["unused.weight"])
    assert part.num_parameters == 8
    assert torch.equal(part.materialize(), torch.zeros(5, 2, 8))
    assert torch.equal(part.gram(), torch.zeros(5, 2, 2))
    assert torch.equal(part.kernel_product(torch.ones(5, 2, 3)), torch.zeros(5, 2, 3))
    assert torch.equal(part.row_inner(part), torch.zeros(5, 2, 2))
    assert part.pull(None, torch.ones(5, 2, 3), torch.ones(5, 2, 3)) == []


def test_a_sample_is_finite_if_its_outputs_and_all_its_gradients_are() -> None:
    model, inputs = build("mlp_2")
    model[4].weight.data.zero_()
    inputs[1], inputs[3] = torch.nan, torch.inf  # Infinite inputs, whose outputs are finite.
    result = JacobianOperator(model, forward=lambda x: model(x).nan_to_num())(inputs)
    assert result.finite().tolist() == [True, False, True, False, True, True, True]


def test_pairs_of_different_batches() -> None:
    model, inputs = build("conv2d")
    operator = JacobianOperator(model)
    left, right = operator(inputs), operator(inputs[:3] * 2)
    close(left.inner(right), torch.einsum("iap,jbp->ijab", left.materialize(), right.materialize()), 1e-12)
    with pytest.raises(ValueError, match="Expected `other` to be a Jacobian of the same parameters"):
        left.inner(right.only(["0.weight"]))


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `weight` to be of shape \(7, 2, c\), but got shape \(2, 7, 1\)"):
        jacobian("mlp_2").weighted_sum(torch.ones(2, 7, 1))


@pytest.mark.parametrize("name", ["mlp_2", "conv2d", "embedding", "layer_norm", "attention", "bare_parameter_on_root", "gru"])
def test_create_graph_gives_the_second_derivative(name: str) -> None:
    model, inputs = build(name)
    parameters = list(model.parameters())
    found, wanted = (
        (jacobian @ jacobian.mT).sum()
        for jacobian in (
            per_sample_jacobian(model, inputs, create_graph=True).materialize(),
            oracles.differentiable_jacobian(model, inputs),
        )
    )
    close(found.detach(), wanted.detach(), 1e-10)
    by_parameter = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, wanted))
    for parameter, got, right in zip(parameters, *by_parameter, strict=True):
        zeros = torch.zeros_like(parameter)
        close(zeros if got is None else got, zeros if right is None else right, 1e-9)
    loose = per_sample_jacobian(model, inputs, create_graph=True).detached()
    assert not any(part.requires_grad for part in [*loose.parts, loose.outputs])
