"""Every method of the per-sample Jacobian, on every case, against a loop over samples in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_netsim.data.trees import map_leaves
from lightning_netsim.functional.kernel import inverse_root
from lightning_netsim.jacobian import JacobianOperator, PerSampleJacobian, per_sample_jacobian
from tests import cases, oracles

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


@cache
def oracle(name: str) -> Tensor:
    return oracles.loop_jacobian(*cases.build(name))


def jacobian(name: str, dtype: torch.dtype) -> PerSampleJacobian:
    model, inputs = cases.build(name)

    def cast(leaf: object) -> object:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return per_sample_jacobian(model.to(dtype), map_leaves(cast, inputs))


def split(direction: Tensor, result: PerSampleJacobian) -> dict[str, Tensor]:
    """Cut a (c, P) matrix into one tensor for each parameter."""
    sizes = [shape.numel() for shape in result.shapes.values()]
    parts = direction.split(sizes, 1)
    return {
        name: part.unflatten(1, shape or (1,)).view(-1, *shape)
        for (name, shape), part in zip(result.shapes.items(), parts, strict=True)
    }


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_method_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    wanted, result, tolerance = oracle(name), jacobian(name, dtype), DTYPES[dtype]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*wanted.shape[:2], 3, generator=generator, dtype=torch.float64)
    direction = torch.randn(3, wanted.shape[2], generator=generator, dtype=torch.float64)
    close(result.gram(), wanted @ wanted.mT, tolerance)
    close(result.inner(result), torch.einsum("iap,jbp->ijab", wanted, wanted), tolerance)
    close(result.dot(split(direction.to(dtype), result)), wanted @ direction.mT, tolerance)
    total = result.weighted_sum(weight.to(dtype))
    flat = torch.cat(
        [total[k].reshape(3, -1) if k in total else torch.zeros(3, s.numel()) for k, s in result.shapes.items()], 1
    )
    close(flat, torch.einsum("bdp,bdc->cp", wanted, weight), tolerance)
    close(result.materialize(), wanted, tolerance)
    matrix = torch.randn(*wanted.shape[:2], 3, generator=generator, dtype=torch.float64)
    mixed, wanted_mixed = result.mix(matrix.to(dtype)), torch.einsum("bdp,bdc->bcp", wanted, matrix)
    close(mixed.trace_inner(mixed), torch.einsum("iap,jap->ij", wanted_mixed, wanted_mixed), tolerance)
    close(mixed.trace_dot(split(direction.to(dtype), result)), torch.einsum("bcp,cp->b", wanted_mixed, direction), tolerance)


@pytest.mark.parametrize("name", cases.CASES)
def test_normalized_kernel_in_float32(name: str) -> None:
    result, wanted = jacobian(name, torch.float32), oracle(name)
    root, rank = inverse_root(result.gram())
    scale = (rank[:, None] * rank[None]).sqrt()
    tolerance = 1e-3 if name == "softmax" else 1e-5
    similarity = torch.einsum("iab,ijbc,jca->ij", root, result.inner(result), root) / scale
    torch.testing.assert_close(similarity.double(), oracles.dense_similarity(wanted, floor=1e-6), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["mlp_2", "conv2d", "conv2d_depthwise", "embedding", "transposed2d", "called_twice"])
def test_select_and_precision(name: str) -> None:
    result, wanted = jacobian(name, torch.float32), oracle(name)
    chosen = result.select(torch.tensor([2, 0])).to(torch.float64)
    assert chosen.num_samples == 2
    assert chosen.gram().dtype == torch.float64
    close(chosen.gram(), (wanted @ wanted.mT)[[2, 0]], 1e-5)
    mask = torch.arange(len(wanted)) == 1
    close(result.select(mask).materialize(), wanted[1:2], 1e-5)


@pytest.mark.parametrize("name", ["mlp_2", "conv2d_depthwise", "embedding", "called_twice", "tied_through_function"])
def test_only_some_of_the_parameters(name: str) -> None:
    result, model = jacobian(name, torch.float64), cases.build(name)[0]
    names = list(result.shapes)
    for chosen in ([names[-1]], names[::-2], names):
        part = result.only(iter(chosen))
        wanted = oracles.loop_jacobian(*cases.build(name), parameters=chosen)
        assert list(part.shapes) == chosen
        assert part.num_parameters == sum(model.get_parameter(key).numel() for key in chosen)
        assert (part.num_samples, part.num_directions) == (result.num_samples, result.num_directions)
        close(part.materialize(), wanted, 1e-10)
        close(part.gram(), wanted @ wanted.mT, 1e-10)
        assert torch.equal(part.outputs, result.outputs)
    assert list(result.shapes) == names


def test_a_parameter_that_no_output_depends_on_is_zero() -> None:
    result = jacobian("unused_and_frozen", torch.float64)
    part = result.only(["unused.weight"])
    assert part.num_parameters == 8
    assert not part.materialize().any()
    assert part.materialize().shape == (5, 2, 8)
    assert not part.gram().any()


@pytest.mark.parametrize("names", [["2.weigth"], ["0.weight", "nothing"], "0.weight"])
def test_only_parameters_that_there_are(names: list[str]) -> None:
    with pytest.raises(ValueError, match="Expected `names` to be"):
        jacobian("mlp_2", torch.float32).only(names)


def test_pairs_of_different_batches() -> None:
    model, inputs = cases.build("conv2d")
    operator = JacobianOperator(model.double())
    left, right = operator(inputs.double()), operator(inputs[:3].double() * 2)
    wanted = torch.einsum("iap,jbp->ijab", left.materialize(), right.materialize())
    close(left.inner(right), wanted, 1e-12)


@pytest.mark.parametrize("name", ["mlp_2", "conv2d", "embedding", "layer_norm", "attention", "bare_parameter_on_root", "gru"])
def test_create_graph_gives_the_second_derivative(name: str) -> None:
    model, inputs = cases.build(name)
    model, inputs = model.double(), inputs.double() if inputs.is_floating_point() else inputs
    parameters = list(model.parameters())
    loss = per_sample_jacobian(model, inputs, create_graph=True).gram().sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted_loss = torch.zeros((), dtype=torch.float64)
    for row in range(len(inputs)):
        outputs = model(inputs[row : row + 1])[0]
        rows = [torch.autograd.grad(value, parameters, create_graph=True) for value in outputs]
        flat = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in rows])
        wanted_loss = wanted_loss + (flat @ flat.mT).sum()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=0)
    for got, wanted in zip(found, torch.autograd.grad(wanted_loss, parameters, allow_unused=True), strict=True):
        if wanted is None:
            assert got is None or not got.any()
        else:
            close(wanted if got is None and not wanted.any() else got, wanted, 1e-9)
