"""Products with the kernel matrix and their derivatives, factor by factor, against gradients that are formed and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.jacobian import JacobianOperator, factors
from lightning_netsim.jacobian.convolution import ConvolutionFactor, Geometry, form_gradients, pull_gradients
from lightning_netsim.jacobian.embedding import EmbeddingFactor
from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, OuterFactor
from tests.jacobian.shared import SMALL, close, jacobian


def near(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    close(actual, wanted, 1e-10)


def random_blocks(size: tuple[int, int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, directions = size
    shapes = (directions, directions), (directions, columns), (directions, columns)
    own, receive, send = (torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes)
    return own, receive, send


def held_constant(dense: Tensor, own: Tensor | None, receive: Tensor, send: Tensor) -> Tensor:
    """Return G'_i = G_i own_i + Σ_j G_j send_j receive_iᵀ for G given as rows, shape (B, d, n), one sample at a time."""
    rows = []
    total = sum((send[j].T @ dense[j] for j in range(len(dense))), torch.zeros(send.shape[2], dense.shape[2]).double())
    for i in range(len(dense)):
        mine = torch.zeros_like(dense[i]) if own is None else own[i].T @ dense[i]
        rows.append(mine + receive[i] @ total)
    return torch.stack(rows)


def derivative_by_autograd(factor: AbstractFactor, constant: Tensor) -> list[Tensor | None]:
    """Return the gradient of ⟨G, constant⟩ by each part, through `dense`."""
    parts = [part.detach().clone().requires_grad_(part.is_floating_point()) for part in factor.parts]
    # The formed gradients of a convolution have a derivative of their own; it is tested against `torch.autograd` below.
    (factor.with_parts(parts).dense() * constant).sum().backward()
    return [part.grad for part in parts]


def check_products(factor: AbstractFactor, columns: int) -> None:
    own, receive, send = random_blocks(factor.size, columns)
    dense = factor.dense().detach()
    kernel = torch.einsum("iap,jbp->ijab", dense, dense)
    near(factor.kernel_product(send), torch.einsum("ijab,jbm->iam", kernel, send))
    near(factor.row_inner(factor), torch.stack([kernel[i, i] for i in range(len(kernel))]))
    near(factor.gram(), torch.stack([kernel[i, i] for i in range(len(kernel))]))
    near(factor.inner(factor), kernel)
    for mixing in (own, None):
        constant = held_constant(dense, mixing, receive, send)
        pairs = zip(factor.pull(mixing, receive, send), derivative_by_autograd(factor, constant), strict=True)
        for got, wanted in pairs:
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                near(got, wanted)


@pytest.fixture(params=["at once", "in pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":
        monkeypatch.setattr(factors, "_CACHED_BYTES", {"cpu": 1})


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("name", SMALL)
def test_every_factor_of_every_case(name: str) -> None:
    for factor in jacobian(name)._factors.values():
        check_products(factor, 3)


@pytest.mark.parametrize("name", ["conv2d", "embedding", "called_twice", "transposed2d", "unused_and_frozen"])
def test_the_whole_jacobian_is_the_sum_over_its_parameters(name: str) -> None:
    result = jacobian(name)
    own, receive, send = random_blocks((result.num_samples, result.num_directions), 4)
    dense = result.materialize()
    near(result.kernel_product(send), torch.einsum("iap,jbp,jbm->iam", dense, dense, send))
    other = result.select(torch.arange(result.num_samples).roll(1))
    near(result.row_inner(other), dense @ dense.roll(1, 0).mT)
    pulled = result.pull(own, receive, send)
    wanted = [part for factor in result._factors.values() for part in factor.pull(own, receive, send)]
    for got, right in zip(pulled, wanted, strict=True):
        assert (got is None and right is None) or torch.equal(got, right)


OUTER = {
    "few positions, wide": (3, 2, 2, 20, 30),
    "many positions, narrow": (5, 2, 12, 2, 3),
    "one position": (6, 3, 1, 5, 7),
    "one direction": (4, 1, 3, 4, 4),
    "one sample": (1, 2, 3, 4, 5),
}


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("columns", [1, 40])
@pytest.mark.parametrize("shape", OUTER)
def test_both_ways_of_an_outer_product(shape: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, directions, positions, rows, width = OUTER[shape]
    inputs = torch.randn(batch, positions, width, dtype=torch.float64)
    factor = OuterFactor(inputs, torch.randn(batch, directions, positions, rows, dtype=torch.float64))
    check_products(factor, columns)
    for by_pairs in (False, True):
        monkeypatch.setattr(OuterFactor, "_products_are_cheaper_by_pairs", lambda *_, chosen=by_pairs: chosen)
        check_products(factor, columns)


def test_products_of_different_kinds_of_factors() -> None:
    outer = OuterFactor(torch.randn(4, 3, 5).double(), torch.randn(4, 2, 3, 6).double())
    dense = DenseFactor(torch.randn(4, 2, 6, 5).double())
    near(outer.row_inner(dense), outer.dense() @ dense.dense().mT)
    near(dense.row_inner(outer), dense.dense() @ outer.dense().mT)
    near(outer.row_inner(outer.select(torch.tensor([1, 3, 0, 2]))), outer.dense() @ outer.dense()[[1, 3, 0, 2]].mT)
    index = torch.tensor([[0, 1, 1], [2, -1, 3], [4, 4, 4], [-1, -1, 0]])
    deltas = torch.randn(4, 2, 3, 5).double().masked_fill((index < 0)[:, None, :, None], 0.0)
    embedding = EmbeddingFactor(index, deltas, 6)
    near(embedding.row_inner(dense), embedding.dense() @ dense.dense().mT)
    other = EmbeddingFactor(index.flip(0), deltas.flip(0), 6)
    near(embedding.row_inner(other), embedding.dense() @ other.dense().mT)


GEOMETRIES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1d stride leaves a rest": (nn.Conv1d, {"kernel_size": 3, "stride": 4, "padding": 1}, (12,)),
    "2d whole input": (nn.Conv2d, {"kernel_size": (4, 3)}, (4, 3)),
    "2d stride leaves a rest": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)}, (8, 7)),
    "2d all": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": (1, 2), "groups": 2}, (7, 8)),
    "2d same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}, (6, 6)),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 5)),
    "3d all": (
        nn.Conv3d,
        {"kernel_size": (2, 3, 1), "stride": (1, 2, 3), "padding": (1, 1, 0), "dilation": (2, 1, 1), "groups": 2},
        (4, 6, 5),
    ),
}


def convolution(name: str, directions: int) -> ConvolutionFactor:
    kind, arguments, size = GEOMETRIES[name]
    layer = kind(4, 8, **arguments).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(directions).double())
    inputs = torch.randn(3, 4, *size, dtype=torch.float64)
    model(inputs)
    factor = JacobianOperator(model)(inputs)._factors["0.weight"]
    assert isinstance(factor, ConvolutionFactor)
    return factor


def formed_by_autograd(inputs: Tensor, deltas: Tensor, geometry: Geometry) -> Tensor:
    """Form the gradients one sample and direction at a time: that of ⟨conv(u, W), δ⟩ by W."""
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(geometry.kernel)]
    shape = (deltas.shape[2], inputs.shape[1] // geometry.groups, *geometry.kernel)
    rows = []
    for i in range(len(inputs)):
        for delta in deltas[i]:
            weight = torch.zeros(shape, dtype=inputs.dtype, requires_grad=True)
            steps = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
            moved = convolve(inputs[i : i + 1], weight, None, *steps)[0]
            for axis, count in enumerate(delta.shape[1:], start=1):
                moved = moved.narrow(axis, 0, count)
            rows.append(torch.autograd.grad((moved * delta).sum(), weight, create_graph=True)[0])
    return torch.stack(rows).view(len(inputs), deltas.shape[1], *shape)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_derivative_of_formed_convolution_gradients(name: str, directions: int) -> None:
    factor = convolution(name, directions)
    inputs, deltas = (part.detach().clone().requires_grad_() for part in factor.parts)
    wanted = formed_by_autograd(inputs, deltas, factor.geometry)
    formed = form_gradients(inputs, deltas, factor.geometry)
    close(formed.detach(), wanted.detach(), 1e-12)
    cotangent = torch.randn_like(wanted)
    derivatives = torch.autograd.grad(wanted, (inputs, deltas), cotangent)
    for found in (
        torch.autograd.grad(formed, (inputs, deltas), cotangent),
        pull_gradients(*factor.parts, cotangent, factor.geometry),
        factor.pull_dense(cotangent.flatten(2)),
    ):
        for got, right in zip(found, derivatives, strict=True):
            assert got is not None
            close(got, right, 1e-12)
    assert pull_gradients(*factor.parts, cotangent, factor.geometry, (False, True))[0] is None
    unformed, rows = convolution(name, directions), torch.randn(directions, *factor.shape, dtype=torch.float64)
    dense = unformed.with_parts(unformed.parts).dense()
    near(unformed.dot(rows), dense @ rows.flatten(1).mT)
    near(unformed.trace_dot(rows), (dense * rows.flatten(1)).sum((1, 2)))
    near(unformed.weighted_sum(rows.new_ones(3, directions, 2)).flatten(1)[1], dense.sum((0, 1)))
    check_products(factor, 2)
    if factor.geometry.groups == 1:
        near(factor._gram_by_pixels(), factor.dense() @ factor.dense().mT)
    factor.hold_formed()
    assert factor._kept is not None
    check_products(factor, 2)
    chosen = factor.select(torch.tensor([2, 0]))
    assert chosen._kept is not None
    near(chosen.dense(), factor.dense()[[2, 0]])
    near(chosen.row_inner(factor.select(slice(0, 2))), factor.dense()[[2, 0]] @ factor.dense()[:2].mT)


@pytest.mark.parametrize("positions", [(2, 3), (1, 1)])
def test_fewer_positions_than_fit(positions: tuple[int, int]) -> None:
    """As the adjoint of a transposed convolution has them: the last positions of the input are not used."""
    geometry = Geometry((2, 2), (2, 2), (1, 1), 2, (1, 0))
    inputs = torch.randn(2, 4, 8, 7, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(2, 3, 6, *positions, dtype=torch.float64, requires_grad=True)
    wanted = formed_by_autograd(inputs, deltas, geometry)
    cotangent = torch.randn_like(wanted)
    close(form_gradients(inputs, deltas, geometry).detach(), wanted.detach(), 1e-12)
    found = pull_gradients(inputs.detach(), deltas.detach(), cotangent, geometry)
    for got, right in zip(found, torch.autograd.grad(wanted, (inputs, deltas), cotangent), strict=True):
        assert got is not None
        close(got, right, 1e-12)
