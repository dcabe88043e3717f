"""Gradients of many samples: packed, written into one storage, and compared pair by pair, against a loop in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.jacobian import PerSampleJacobian, factors, per_sample_jacobian
from lightning_netsim.jacobian.convolution import ConvolutionFactor, Geometry
from lightning_netsim.jacobian.embedding import EmbeddingFactor
from lightning_netsim.jacobian.factors import AbstractFactor, DenseFactor, OuterFactor
from tests import cases, oracles
from tests.jacobian.shared import SMALL, check_methods, close, jacobian, oracle

FAST = pytest.mark.parametrize("fast", [True, False], ids=["fast", "small"])


def near(actual: Tensor, wanted: Tensor) -> None:
    close(actual, wanted, 1e-10)


@FAST
@pytest.mark.parametrize("name", SMALL)
def test_packed_and_stored_gradients_are_the_same(name: str, fast: bool) -> None:
    wanted, packed = oracle(name), jacobian(name).packed(fast)
    last = len(wanted) - 2
    storage = packed.empty(len(wanted) + 1)
    stored = storage.select(slice(0, len(wanted)))  # A view that sees what is written.
    storage.write(last, packed.select(slice(last, None)))
    storage.write(0, packed.select(torch.arange(last)))
    for kept in (packed, stored):
        check_methods(kept, wanted, 1e-10)
        near(kept.trace_inner(jacobian(name)), torch.einsum("iap,jap->ij", wanted, wanted))
    assert torch.equal(stored.outputs, packed.outputs)


@FAST
@pytest.mark.parametrize("room", [2**28, 1], ids=["at once", "in pieces"])
@pytest.mark.parametrize(
    "name", ["mlp_2", "positions", "conv2d", "conv2d_small_output", "embedding", "conv3d", "unused_and_frozen"]
)
def test_traces_of_some_with_all(name: str, room: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "WORKING_BYTES", room)
    monkeypatch.setattr(factors, "_PIECES_BYTES", {"cpu": room})
    wanted, result = oracle(name), jacobian(name)
    chosen = torch.tensor([3, 0, 2])
    for left, right in [(result, result), (result.packed(fast), result.packed(fast)), (result, result.packed(fast))]:
        near(left.select(chosen).trace_inner(right), torch.einsum("iap,jap->ij", wanted[chosen], wanted))
        near(left.trace_inner(right), torch.einsum("iap,jap->ij", wanted, wanted))
        some = torch.tensor([1, 3])
        near(left.trace_tile(chosen, right, some), torch.einsum("iap,jap->ij", wanted[chosen], wanted[some]))


@pytest.mark.parametrize("room", [2**28, 1], ids=["at once", "in pieces"])
@pytest.mark.parametrize("formed", [True, False], ids=["formed", "by positions"])
def test_traces_of_a_layer_at_several_positions(formed: bool, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "WORKING_BYTES", room)
    monkeypatch.setattr(factors, "_PIECES_BYTES", {"cpu": room})
    monkeypatch.setattr(OuterFactor, "_pairs_are_cheaper_formed", lambda *_, **__: formed)
    left, *others = (OuterFactor(torch.randn(n, 3, 4).double(), torch.randn(n, 2, 3, 5).double()) for n in (6, 6, 4))
    for other in (left, *others):
        near(left.trace_inner(other), left.dense().flatten(1) @ other.dense().flatten(1).mT)


def linear(positions: int, columns: int, rows: int, directions: int = 2) -> AbstractFactor:
    return OuterFactor(torch.randn(3, positions, columns), torch.randn(3, directions, positions, rows))


def convolution(channels: int, size: int, rows: int, kernel: int) -> AbstractFactor:
    inputs, out = torch.randn(3, channels, size, size), size - kernel + 1
    geometry = Geometry((kernel, kernel), (1, 1), (1, 1), 1, (0, 0))
    return ConvolutionFactor(inputs, torch.randn(3, 2, rows, out, out), geometry)


def table() -> AbstractFactor:
    return EmbeddingFactor(torch.tensor([[1, 2, -1]]), torch.ones(1, 2, 3, 4) * torch.tensor([1.0, 1, 0])[:, None], 5)


#: What a factor is packed as: for speed, and for size.
FORMS: dict[str, tuple[Callable[[], AbstractFactor], type[AbstractFactor], type[AbstractFactor]]] = {
    "one position": (lambda: linear(1, 30, 20), OuterFactor, OuterFactor),
    "one column": (lambda: linear(1, 1, 20), DenseFactor, DenseFactor),
    "more positions": (lambda: linear(8, 40, 30), DenseFactor, OuterFactor),
    "many channels": (lambda: convolution(32, 4, 32, 3), OuterFactor, ConvolutionFactor),
    "a picture of a medium size": (lambda: convolution(16, 8, 16, 3), DenseFactor, ConvolutionFactor),
    "a table": (table, EmbeddingFactor, EmbeddingFactor),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_packed_form_depends_on_shapes_alone(name: str) -> None:
    build, fast, small = FORMS[name]
    factor = build()
    for samples in (slice(0, None), slice(0, 1), slice(0, 0)):
        some = factor.select(samples)
        assert type(some.packed(fast=True)) is fast
        assert type(some.packed(fast=False)) is small
    forms = (factor, factor.packed(True), factor.packed(False), factor.formed())
    assert forms[2].kept_bytes == min(sum(part.nbytes for part in form.parts) for form in forms)
    for form in forms:
        assert form.shape == factor.shape
        torch.testing.assert_close(form.dense(), factor.dense())


def test_what_is_packed_keeps_no_larger_tensor_alive() -> None:
    whole = linear(1, 30, 20)
    for fast in (True, False):
        packed = whole.select(slice(1, 2)).packed(fast)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in packed.parts)
        assert all(part.data_ptr() == own.data_ptr() for part, own in zip(whole.packed(fast).parts, whole.parts, strict=True))


@FAST
@pytest.mark.parametrize("layer", ["linear", "embedding", "convolution"])
def test_batches_of_several_lengths_share_a_storage(layer: str, fast: bool) -> None:
    batches = {
        "convolution": [torch.randn(2, 2, *size).double() for size in ((6, 6), (9, 4), (3, 12), (40, 40))],
        "embedding": [torch.randint(0, 9, (2, length)) for length in (3, 5, 2)],
        "linear": [torch.randn(2, length, 20).double() for length in (3, 5, 2)],
    }[layer]
    first: nn.Module = {
        "convolution": nn.Conv2d(2, 30, 3, stride=2, padding=1),
        "embedding": nn.Embedding(9, 30),
        "linear": nn.Linear(20, 30),
    }[layer]
    average = cases.Lambda(lambda x: x.mean((2, 3) if layer == "convolution" else 1))
    model = nn.Sequential(first, nn.Tanh(), average, nn.Linear(30, 2)).double()
    storage: PerSampleJacobian | None = None
    for number, batch in enumerate(batches):
        packed = per_sample_jacobian(model, batch).packed(fast)
        storage = storage or packed.empty(2 * len(batches))
        storage.write(2 * number, packed)
    assert storage is not None
    wanted = torch.cat([oracles.loop_jacobian(model, batch) for batch in batches])
    near(storage.materialize(), wanted)
    near(storage.trace_inner(storage), torch.einsum("iap,jap->ij", wanted, wanted))


class Sometimes(nn.Module):
    """Uses its table and its second layer only where the first input of the batch is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(4, 3), nn.Linear(4, 3), nn.Embedding(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            return self.first(x) + self.second(x).tanh() * self.table((x[:, 1] > 0).long())
        return self.first(x)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_a_parameter_that_only_some_batches_depend_on(order: tuple[int, ...]) -> None:
    model, inputs = Sometimes().double(), torch.randn(8, 4).double().abs()
    batches = [-inputs[:3], inputs[3:5], -inputs[5:6]]
    packed = [per_sample_jacobian(model, batch).packed(fast=True) for batch in batches]
    wanted = torch.cat([oracles.loop_jacobian(model, batch) for batch in batches])
    storage = packed[order[0]].empty(6)
    for number in order:
        storage.write((0, 3, 5)[number], packed[number])
    near(storage.materialize(), wanted)
    near(storage.gram(), wanted @ wanted.mT)


def test_what_does_not_fit_is_refused() -> None:
    model, inputs = cases.build("mlp_2")
    packed = per_sample_jacobian(model, inputs).packed(fast=True)
    storage = packed.empty(8)
    with pytest.raises(ValueError, match="Expected `start` to be a place with room for 7 of 8 samples, but got 2"):
        storage.write(2, packed)
    with pytest.raises(ValueError, match=r"gradients like .*directions=2.*, but got .*directions=1"):
        storage.write(0, per_sample_jacobian(model, inputs, directions=1).packed(fast=True))
    with pytest.raises(ValueError, match="Expected `other` to be gradients like"):
        storage.write(0, per_sample_jacobian(model, inputs, parameters="0").packed(fast=True))
