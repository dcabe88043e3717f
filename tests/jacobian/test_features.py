"""Gradient features against the float64 oracle, left-out samples, notes, activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim.jacobian import SketchProjection
from lightning_netsim.jacobian.feature_batches import (
    AbstractFeatureBatch,
    DenseFeatureBatch,
    GradientFeatureBatch,
    UnitFeatureBatch,
)
from lightning_netsim.jacobian.features import ActivationFeatures, GradientFeatures
from tests import cases, oracles
from tests.jacobian.shared import build, oracle

NAMES = [
    "mlp_1",
    "mlp_2",
    "mlp_10",
    "conv2d",
    "conv2d_small_output",
    "batch_norm_zero_gamma",
    "embedding",
    "lstm",
    "tied_through_function",
]


def features(name: str, dtype: torch.dtype = torch.float32, directions: str = "all") -> GradientFeatureBatch:
    model, inputs = build(name, dtype)
    return GradientFeatures(model, directions=directions)(inputs)


def similarity(name: str, floor: float = 1e-12) -> Tensor:
    return oracles.dense_similarity(oracle(name), floor)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_the_similarity(name: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, wanted = features(name, dtype), similarity(name, 1e-12 if dtype == torch.float64 else 1e-6)
    found = {
        "inner": batch.inner(batch),
        "vectors": batch.vectors() @ batch.vectors().mT,
        "dense": DenseFeatureBatch(batch.vectors(), normalize=False).inner(DenseFeatureBatch(batch.vectors())),
    }
    for how, value in found.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance, msg=lambda text, how=how: f"{how}: {text}")
    torch.testing.assert_close(batch.dot(batch.sum()).double(), wanted.sum(1), rtol=0, atol=tolerance * len(wanted))
    torch.testing.assert_close(batch.norm.double(), oracle(name).flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    assert batch.rank.tolist() == oracles.dense_ranks(oracle(name), 1e-12 if dtype == torch.float64 else 1e-6)


def test_probabilities_have_one_rank_less() -> None:
    jacobian = oracle("softmax")
    exact = features("softmax", torch.float64)
    assert exact.rank.tolist() == [3] * 7 == oracles.dense_ranks(jacobian)
    torch.testing.assert_close(exact.inner(exact), oracles.dense_similarity(jacobian), rtol=0, atol=1e-8)
    single = features("softmax")
    assert single.rank.tolist() == oracles.dense_ranks(jacobian, 1e-6)
    torch.testing.assert_close(single.inner(single).double(), oracles.dense_similarity(jacobian, 1e-6), rtol=0, atol=1e-3)


def test_ill_conditioned_outputs_in_float32() -> None:
    """The second output is the first and a little more: λ_min/λ_max lies where the sums of float32 have too few digits."""
    model, inputs = cases.build("mlp_2")
    mixing = nn.Linear(2, 2, bias=False).requires_grad_(False)
    mixing.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.004]]))
    model = nn.Sequential(model, mixing)
    jacobian = oracles.loop_jacobian(model, inputs)
    values = torch.linalg.eigvalsh(jacobian @ jacobian.mT)
    assert bool((values[:, 0] < 1e-5 * values[:, 1]).all())
    batch = GradientFeatures(model)(inputs)
    assert batch.rank.tolist() == oracles.dense_ranks(jacobian, 1e-6)
    torch.testing.assert_close(batch.inner(batch).double(), oracles.dense_similarity(jacobian, 1e-6), rtol=0, atol=2e-4)


def test_notes_recommend_logits() -> None:
    model, inputs = cases.build("softmax")
    collected = GradientFeatures(model, directions="all")
    collected(inputs)
    assert len(collected.notes) == 2
    assert all("compare logits instead" in note for note in collected.notes)
    for other in (model[0], nn.Sequential(model[0], nn.Softplus())):
        silent = GradientFeatures(other, directions="all")
        silent(inputs)
        assert not silent.notes
    # Directions may be fewer than outputs, but probabilities stay probabilities.
    few = GradientFeatures(model, directions=2)
    few(inputs)
    assert len(few.notes) == 1


class Dead(nn.Module):
    """A ReLU that nothing passes where the input is negative: a gradient of zero."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(3, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) @ self.weight


@pytest.mark.parametrize("outputs", [1, 2])
def test_samples_without_a_usable_gradient_are_left_out(outputs: int) -> None:
    inputs = torch.rand(6, 3) + 0.1
    inputs[1], inputs[4] = -1.0, torch.nan
    model = Dead(outputs)
    batch = GradientFeatures(model)(inputs)
    valid = torch.tensor([True, False, True, True, False, True])
    assert batch.valid.tolist() == valid.tolist()
    assert batch.rank[~valid].tolist() == [0, 0]
    assert batch.vectors().shape == (4, 3 * outputs**2)
    wanted = oracles.dense_similarity(oracles.loop_jacobian(model, inputs))
    inner = batch.inner(batch)
    assert torch.equal(inner.isnan(), ~(valid[:, None] & valid[None]))
    torch.testing.assert_close(inner.double(), wanted, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(batch.dot(batch.sum()).double()[valid], wanted.nansum(1)[valid], rtol=0, atol=1e-5)
    assert bool(batch.dot(batch.sum())[~valid].isnan().all())


def test_a_batch_in_which_nothing_is_left() -> None:
    inputs = -torch.rand(4, 3)
    model = Dead()
    features_of = GradientFeatures(model)
    batch, good = features_of(inputs), features_of(-inputs)
    assert not bool(batch.valid.any())
    assert batch.vectors().shape == (0, 12)
    assert not any(value.any() for value in batch.sum().values())
    assert bool(batch.dot(good.sum()).isnan().all())
    assert bool(batch.inner(good).isnan().all())


def test_different_kinds_are_not_compared() -> None:
    batch, dense = features("mlp_2"), DenseFeatureBatch(torch.ones(2, 3))
    for gradients in (batch, UnitFeatureBatch(batch.unit)):
        with pytest.raises(ValueError, match="Expected `other` to be gradient features, but got DenseFeatureBatch"):
            gradients.inner(dense)


def test_vectors_to_find_candidates_by() -> None:
    batch = features("mlp_10", torch.float64)
    projection = SketchProjection(batch.jacobian.shapes, 10_000)  # Exact.
    torch.testing.assert_close(batch.shortlist_vectors(projection, None), batch.vectors())
    mixture = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64)).Q
    mixed = (mixture.mT @ batch.vectors().view(7, 10, -1)).flatten(1)
    wanted = nn.functional.normalize(mixed)
    found = batch.shortlist_vectors(projection, mixture)
    torch.testing.assert_close(found @ found.mT, wanted @ wanted.mT)


def test_dense_features() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0], [0.0, -2.0], [torch.inf, 0.0]])
    batch = DenseFeatureBatch(vectors)
    assert batch.valid.tolist() == [True, False, False, True, False]
    assert batch.rank.tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(batch.vectors(), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    torch.testing.assert_close(batch.inner(batch)[0, 3], torch.tensor(-0.8))
    torch.testing.assert_close(batch.dot(batch.sum())[[0, 3]], torch.tensor([0.2, 0.2]))
    assert DenseFeatureBatch(vectors[:1].half()).vectors().dtype == torch.float32
    assert torch.equal(DenseFeatureBatch(vectors[:1], normalize=False).vectors(), vectors[:1])


@pytest.mark.parametrize(("name", "layer", "stop"), [("mlp_2", None, 4), ("conv2d", "1", 2)])
def test_activations_are_those_before_the_last_linear_layer_or_of_a_named_one(name: str, layer: str | None, stop: int) -> None:
    model, inputs = cases.build(name)
    activations = ActivationFeatures(model, model, layer)
    assert activations.is_possible
    batch = activations(inputs)
    wanted = nn.functional.normalize(model[:stop](inputs).flatten(1), dim=1)
    torch.testing.assert_close(batch.vectors(), wanted[batch.valid].detach())
    assert not batch.vectors().requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(activations(inputs.clone()).vectors(), batch.vectors())


def test_activations_that_do_not_exist() -> None:
    model, inputs = cases.build("conv2d")
    with pytest.raises(ValueError, match=r"the name of a module in the model, but got 'head'. There are '0', '1', '2', '3'\."):
        ActivationFeatures(model, model, layer="head")
    assert not ActivationFeatures(model[:2], model[:2]).is_possible
    with pytest.raises(ValueError, match="a module that the forward pass calls, but got none"):
        ActivationFeatures(model, model[:2])(inputs)


def test_long_vectors_are_multiplied_as_precisely_as_short_ones() -> None:
    vectors = torch.rand(2, 2**22, generator=torch.Generator().manual_seed(0)) + 0.5
    vectors /= vectors.double().norm(dim=1, keepdim=True).float()
    wanted = vectors.double() @ vectors.double().mT
    batch = DenseFeatureBatch(vectors, normalize=False)
    torch.testing.assert_close(batch.inner(batch).double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.dot({"vector": vectors[0]}).double(), wanted[0], rtol=0, atol=1e-6)


def kinds(batch: GradientFeatureBatch) -> dict[str, AbstractFeatureBatch]:
    """Return the valid samples of a batch in every form."""
    return {
        "gradients": batch,
        "unit": UnitFeatureBatch(batch.unit),
        "packed": UnitFeatureBatch(batch.unit.packed(fast=False)),
        "packed to be fast": UnitFeatureBatch(batch.unit.packed(fast=True)),
        "dense": DenseFeatureBatch(batch.vectors(), normalize=False),
    }


@pytest.mark.parametrize("name", NAMES)
def test_stored_features_are_those_they_were_made_of(name: str) -> None:
    batch, wanted = features(name, torch.float64), similarity(name)
    model, _ = cases.build(name)
    projection = SketchProjection({key: parameter.shape for key, parameter in model.named_parameters()}, 40, 3)
    total = batch.sum()
    for how, unit in kinds(batch).items():
        if isinstance(unit, UnitFeatureBatch):
            for value in (unit.inner(unit), unit.inner(batch), batch.inner(unit)):
                torch.testing.assert_close(value, wanted, rtol=0, atol=1e-8, msg=how)
            torch.testing.assert_close(unit.dot(total), wanted.sum(1), rtol=0, atol=1e-8, msg=how)
            torch.testing.assert_close(unit.vectors(), batch.vectors())
            torch.testing.assert_close(unit.vectors(projection), batch.vectors(projection))
            assert unit.sum().keys() == total.keys()
            for key, value in unit.sum().items():
                torch.testing.assert_close(value, total[key], rtol=0, atol=1e-10, msg=how)
            assert bool(unit.valid.all())
            assert unit.norm.tolist() == unit.rank.tolist() == [1] * len(wanted)


@pytest.mark.parametrize("chosen", [[3, 0], [1, 1, 2], []], ids=str)
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_selection_counts_among_the_valid_samples(chosen: list[int], outputs: int) -> None:
    inputs = torch.rand(6, 3) + 0.1
    inputs[1], inputs[4] = -1.0, torch.nan
    batch = GradientFeatures(Dead(outputs))(inputs)
    whole, rows, good = batch.vectors(), torch.tensor(chosen, dtype=torch.int64), torch.tensor([0, 2, 3, 5])
    for how, form in kinds(batch).items():
        part = form.select(rows)
        assert type(part) is type(form)
        assert part.valid.tolist() == [True] * len(chosen), how
        torch.testing.assert_close(part.vectors(), whole[rows])
        torch.testing.assert_close(part.dot(batch.sum() if how != "dense" else form.sum()), batch.dot(batch.sum())[good][rows])
    selected = batch.select(rows)
    torch.testing.assert_close(selected.norm, batch.norm[good][rows])
    assert selected.rank.tolist() == batch.rank[good][rows].tolist()
    assert selected.select(torch.arange(len(chosen)).flip(0)).norm.tolist() == selected.norm.flip(0).tolist()
