"""Labels averaged over kernel neighbors: sums and pairs against the oracle, stationary networks, and random probes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_netsim import per_sample_jacobian
from lightning_netsim._checks import NetsimError
from lightning_netsim.estimators import LabelDenoising, denoising
from lightning_netsim.functional.results import LabelDenoisingResult
from lightning_netsim.jacobian import PerSampleJacobian
from tests import cases
from tests.denoising_oracles import (
    FITTED,
    LOSS_OUTPUTS,
    LOSSES,
    Denoised,
    by_matrices,
    by_outputs,
    inseparable_labels,
    labels_at_the_bottom,
    train_to_the_bottom,
)
from tests.functional.test_kernel import network
from tests.oracles import loop_jacobian

EXACT = {"rtol": 1e-8, "atol": 1e-8}
WAYS = [("matrix", False), ("matrix", True), ("outputs", True)]
SAMPLES = 11


def points(number: int = SAMPLES, seed: int = 0, features: int = 4) -> Tensor:
    return torch.randn(number, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ask(
    estimator: LabelDenoising,
    reference: PerSampleJacobian,
    targets: Tensor,
    queries: PerSampleJacobian | None = None,
    outputs: Tensor | None = None,
    own: Tensor | None = None,
    size: int = 100,
    lipschitz: Tensor | None = None,
) -> LabelDenoisingResult:
    """Give a reference set to an estimator and ask for queries, `size` samples at a time."""
    queries = reference if queries is None else queries
    outputs = reference.outputs if outputs is None else outputs
    own = (outputs if queries is reference else queries.outputs) if own is None else own
    for part in torch.arange(reference.num_samples).split(size):
        estimator.update(reference.select(part), targets[part], outputs[part])
    for part in torch.arange(queries.num_samples).split(size):
        estimator.query(queries.select(part), own[part])
    return estimator.compute(lipschitz)


def check(found: LabelDenoisingResult, wanted: Denoised, factor: bool = True, **tolerance: float) -> None:
    """Hold what was found to the oracle; without `factor`, where that is an estimate."""
    tolerance = tolerance or EXACT
    names = ["smoothed_targets", "smoothed_outputs", "consistency", "residual", *(["factor"] if factor else [])]
    for name in names:
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), **tolerance)
    assert (found.spread is None) == (wanted.spread is None)
    if found.spread is not None and found.clamped is not None:
        # The root of a rounding error of 1e-16 is 1e-8: that of a sample with itself.
        torch.testing.assert_close(found.spread.double(), wanted.spread, rtol=tolerance["rtol"], atol=tolerance["atol"] ** 0.5)
        torch.testing.assert_close(found.clamped.double(), wanted.clamped, **EXACT)


def oracle(kernel: str, *arguments: Tensor) -> Denoised:
    return by_matrices(*arguments) if kernel == "matrix" else by_outputs(*arguments)


# The oracle


@pytest.mark.parametrize(("kernel", "all_pairs"), WAYS)
@pytest.mark.parametrize(("outputs", "other"), [(1, True), (3, False), (3, True)])
def test_against_the_oracle(kernel: str, all_pairs: bool, outputs: int, other: bool) -> None:
    model, inputs, targets = network(1, outputs), points(), points(SAMPLES, 2, outputs)
    reference = per_sample_jacobian(model, inputs)
    asked = points(5, 3) if other else inputs
    queries = per_sample_jacobian(model, asked) if other else reference
    found = ask(LabelDenoising(kernel, all_pairs), reference, targets, queries, size=4)
    wanted = oracle(
        kernel, loop_jacobian(model, asked), loop_jacobian(model, inputs), targets, reference.outputs, queries.outputs
    )
    check(found, wanted, factor=all_pairs)
    assert found.num_reference == SAMPLES
    assert found.factor_error == (0.0 if all_pairs else 1 / math.sqrt(64))
    assert found.bound is None
    assert found.lipschitz is None


@pytest.mark.parametrize("all_pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_sum_to_one(dtype: torch.dtype, all_pairs: bool) -> None:
    """The sum of the kernels has no inverse, and what rounding leaves of it must not be inverted."""
    model, inputs = cases.build("softmax")
    jacobian, dense = per_sample_jacobian(model.to(dtype), inputs.to(dtype)), loop_jacobian(model, inputs)
    targets, outputs = points(7, 4, 4), jacobian.outputs
    found = ask(LabelDenoising(all_pairs=all_pairs), jacobian, targets, size=3)
    wanted = by_matrices(dense, dense, targets, outputs, outputs, floor=1e-9)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    check(found, wanted, all_pairs, rtol=tolerance, atol=tolerance)
    assert bool((found.factor < 2 * wanted.factor).all())


@pytest.mark.parametrize(("kernel", "all_pairs"), WAYS)
def test_the_size_of_chunks_and_tiles_does_not_matter(kernel: str, all_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    jacobian, targets = per_sample_jacobian(network(1, 3), points(23)), points(23, 2, 3)
    whole = ask(LabelDenoising(kernel, all_pairs), jacobian, targets)
    for size, tile in ((1, 2**24), (7, 50), (10, 2 * 9 * 10)):
        monkeypatch.setattr(denoising, "_TILE_ELEMENTS", tile)
        found = ask(LabelDenoising(kernel, all_pairs), jacobian, targets, size=size)
        for name, value in vars(whole).items():
            # Random signs are those of a sample's place in the set, not of its chunk.
            torch.testing.assert_close(
                getattr(found, name), value, **(EXACT if name != "spread" else {"rtol": 0, "atol": 1e-7})
            )


# Identities of the paper


@pytest.mark.parametrize(("kernel", "all_pairs"), WAYS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_all_samples_alike_and_all_independent(kernel: str, all_pairs: bool, outputs: int) -> None:
    targets = points(16, 2, outputs)
    alike = per_sample_jacobian(network(1, outputs), points(1).expand(16, -1))
    found = ask(LabelDenoising(kernel, all_pairs), alike, targets)
    torch.testing.assert_close(found.smoothed_targets, targets.mean(0).expand(16, -1), **EXACT)
    torch.testing.assert_close(found.consistency, torch.zeros(16).double(), **EXACT)
    layer = nn.Linear(16, outputs, bias=False).double()
    alone = per_sample_jacobian(layer, 3 * torch.eye(16, dtype=torch.float64))
    single = ask(LabelDenoising(kernel, all_pairs), alone, targets)
    torch.testing.assert_close(single.smoothed_targets, targets, **EXACT)
    torch.testing.assert_close(single.residual, 9 * (alone.outputs - targets), **EXACT)
    # A sum with a single random sign in it has no error.
    torch.testing.assert_close(single.factor, torch.ones(16).double(), **EXACT)
    if all_pairs:
        torch.testing.assert_close(found.factor, torch.full((16,), 1 / 4).double(), **EXACT)


# Stationary networks


@pytest.mark.parametrize(("loss", "outputs"), LOSS_OUTPUTS)
def test_the_residual_is_the_change_of_outputs_down_the_gradient_of_the_loss(loss: str, outputs: int) -> None:
    model, inputs, targets = network(1, outputs), points(30), inseparable_labels(loss, 30, outputs)
    jacobian = per_sample_jacobian(model, inputs)
    gradient = torch.autograd.grad(LOSSES[loss](model(inputs), targets), list(model.parameters()))
    wanted = loop_jacobian(model, inputs) @ torch.cat([part.flatten() for part in gradient])
    assert float(wanted.abs().max()) > 1
    for way in WAYS:
        found = ask(LabelDenoising(*way), jacobian, targets, outputs=FITTED[loss](jacobian.outputs))
        torch.testing.assert_close(found.residual, wanted, **EXACT)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("loss", "outputs"), LOSS_OUTPUTS)
def test_at_a_minimum_smoothed_outputs_are_smoothed_labels(loss: str, outputs: int, hidden: bool) -> None:
    """Of logistic and linear regression, on inputs and on features of a layer that is not trained."""
    first = [nn.Linear(4, 5).requires_grad_(False), nn.Tanh()] if hidden else []
    model = nn.Sequential(*first, nn.Linear(5 if hidden else 4, outputs)).double()
    inputs, targets = points(30), inseparable_labels(loss, 30, outputs)
    train_to_the_bottom(model, inputs, targets, loss)
    _check_stationary(model, inputs, targets, loss)


@pytest.mark.parametrize(("loss", "outputs"), LOSS_OUTPUTS)
def test_a_stationary_deep_network(loss: str, outputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, outputs)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    inputs = points(60)
    fitted = FITTED[loss](model(inputs).detach())
    targets = labels_at_the_bottom(loop_jacobian(model, inputs), fitted)
    _check_stationary(model, inputs, targets, loss)


def _check_stationary(model: nn.Module, inputs: Tensor, targets: Tensor, loss: str) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(LOSSES[loss](model(inputs), targets), trained)
    assert max(float(part.abs().max()) for part in gradient) < 1e-9
    reference = per_sample_jacobian(model, inputs)
    queries = per_sample_jacobian(model, points(5, 8))
    fitted = FITTED[loss](reference.outputs)
    assert float((fitted - targets).abs().mean()) > 0.1
    with torch.no_grad():
        trained[-1][0] += 0.1
    away = per_sample_jacobian(model, inputs)
    for way in WAYS:
        for asked in (reference, queries):
            found = ask(LabelDenoising(*way), reference, targets, asked, fitted)
            torch.testing.assert_close(found.residual, torch.zeros_like(found.residual), **EXACT)
            if way[0] == "matrix":
                torch.testing.assert_close(found.smoothed_outputs, found.smoothed_targets, **EXACT)
        # Away from the minimum it is not so.
        moved = ask(LabelDenoising(*way), away, targets, outputs=FITTED[loss](away.outputs))
        assert float(moved.residual.abs().max()) > 1e-3


# Random probes


@pytest.mark.parametrize(("outputs", "probes"), [(1, 4), (3, 32)])
def test_the_estimated_factor_is_within_its_error(outputs: int, probes: int) -> None:
    jacobian, targets = per_sample_jacobian(network(2, outputs), points()), points(SAMPLES, 2, outputs)
    exact = ask(LabelDenoising(all_pairs=True), jacobian, targets).factor
    runs = [ask(LabelDenoising(num_probes=probes, seed=seed), jacobian, targets) for seed in range(100)]
    found = torch.stack([run.factor for run in runs])
    assert runs[0].factor_error == pytest.approx(1 / math.sqrt(2 * probes))
    # The square is estimated without bias: its relative standard error is at most √(2/m), of the mean of R runs √(2/(m R)).
    ratio = (found / exact).square()
    assert float((ratio.mean(0) - 1).abs().max()) < 4 * math.sqrt(2 / probes / 100)
    error = (found / exact - 1).square().mean(0).sqrt()
    assert float(error.max()) < 1.2 * runs[0].factor_error
    assert float(error.max()) > 0.3 * runs[0].factor_error
    many = ask(LabelDenoising(num_probes=5000), jacobian, targets).factor
    torch.testing.assert_close(many, exact, rtol=4 / math.sqrt(10_000), atol=0)


def test_seed_and_reset() -> None:
    jacobian, targets = per_sample_jacobian(network(2, 2), points()), points(SAMPLES, 2, 2)
    estimator = LabelDenoising(num_probes=4)
    state = torch.get_rng_state()
    first = ask(estimator, jacobian, targets)
    assert torch.equal(torch.get_rng_state(), state)
    estimator.reset()
    assert torch.equal(ask(estimator, jacobian, targets).factor, first.factor)
    other = ask(LabelDenoising(num_probes=4, seed=1), jacobian, targets)
    assert not torch.equal(other.factor, first.factor)
    torch.testing.assert_close(other.smoothed_targets, first.smoothed_targets, rtol=0, atol=0)


# Samples that are left out


@pytest.mark.parametrize(("kernel", "all_pairs"), WAYS)
def test_what_is_not_finite_is_left_out(kernel: str, all_pairs: bool) -> None:
    model, inputs, targets = network(1, 2), points(), points(SAMPLES, 2, 2)
    inputs[2, 1] = torch.nan
    targets[5, 0] = torch.inf
    outputs = model(inputs).detach()
    outputs[7, 1] = torch.nan
    kept = torch.tensor([row for row in range(SAMPLES) if row not in (2, 5, 7)])
    jacobian = per_sample_jacobian(model, inputs)
    found = ask(LabelDenoising(kernel, all_pairs), jacobian, targets, outputs=outputs, size=4)
    only = jacobian.select(kept)
    wanted = ask(LabelDenoising(kernel, all_pairs), only, targets[kept], outputs=outputs[kept])
    assert found.num_reference == SAMPLES - 3
    for name in ("smoothed_targets", "smoothed_outputs", "residual", "consistency", "factor"):
        value = getattr(found, name)
        torch.testing.assert_close(value[kept], getattr(wanted, name), **EXACT)
        assert bool(value[2].isnan().all())
        assert bool(value[5].isfinite().all())
    assert bool(found.consistency[7].isnan())
    assert bool(found.factor[7].isfinite())


@pytest.mark.parametrize(("kernel", "all_pairs"), WAYS)
def test_a_query_without_a_gradient_is_nan(kernel: str, all_pairs: bool) -> None:
    inputs = points()
    inputs[4] = 0
    jacobian = per_sample_jacobian(nn.Linear(4, 2, bias=False).double(), inputs)
    found = ask(LabelDenoising(kernel, all_pairs), jacobian, points(SAMPLES, 2, 2))
    assert found.factor.isnan().nonzero().flatten().tolist() == [4]
    for name in ("smoothed_targets", "smoothed_outputs", "consistency", "residual"):
        assert bool(getattr(found, name)[4].isnan().all())
    if found.clamped is not None:
        assert bool(found.clamped.isfinite().all())


# The bound, and bad input


def test_the_bound_is_the_spread_times_the_constant() -> None:
    jacobian = per_sample_jacobian(network(1, 2), points())
    estimator = LabelDenoising("outputs")
    spread = ask(estimator, jacobian, jacobian.outputs).spread
    constant = torch.tensor([3.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(estimator.compute(constant).bound, math.sqrt(2) * constant * spread, **EXACT)


def test_bad_input_is_named() -> None:
    jacobian, column = per_sample_jacobian(network(1, 2), points(3)), torch.zeros(3, 2)
    for arguments, complaint in (
        ({"kernel": "output"}, "`kernel` to be one of .* Did you mean 'outputs'"),
        ({"num_probes": 0}, "`num_probes` to be a positive int, but got 0"),
        ({"seed": -1}, "`seed` to be an int"),
    ):
        options: dict[str, Any] = arguments
        with pytest.raises(NetsimError, match=complaint):
            LabelDenoising(**options)
    estimator = LabelDenoising()
    with pytest.raises(NetsimError, match="Call `update` before `query`"):
        estimator.query(jacobian, column)
    with pytest.raises(NetsimError, match="Call `query` first"):
        estimator.compute()
    for targets, outputs, complaint in (
        (torch.zeros(2, 2), column, r"`targets` to be of shape \(3, 2\) to fit the gradients, but got shape \(2, 2\)"),
        (torch.zeros(3, 2).long(), column, "`targets` to be a floating-point tensor"),
        (column, torch.zeros(3, 1), r"`outputs` to be of shape \(3, 2\).*Differentiate every output"),
    ):
        with pytest.raises(NetsimError, match=complaint):
            estimator.update(jacobian, targets, outputs)
    estimator.update(jacobian.select(torch.tensor([0])), column[:1] * torch.nan, column[:1])
    with pytest.raises(NetsimError, match="at least one usable sample"):
        estimator.query(jacobian, column)
    estimator.update(jacobian, column, column)
    with pytest.raises(NetsimError, match="`outputs` to be of shape"):
        estimator.query(jacobian, torch.zeros(2, 2))
    mixed, another = jacobian.mix(column.double().unsqueeze(2)), nn.Linear(4, 2).double()
    for other, zero in ((per_sample_jacobian(another, points(3)), column), (mixed, column[:, :1])):
        with pytest.raises(NetsimError, match="Expected `jacobian` to be"):
            estimator.update(other, zero, zero)
        with pytest.raises(NetsimError, match="Expected `jacobian` to be"):
            estimator.query(other, zero)
    estimator.query(jacobian, column)
    with pytest.raises(NetsimError, match='`kernel` to be "outputs" for a bound'):
        estimator.compute(torch.ones(2))
    with pytest.raises(NetsimError, match="Expected `lipschitz` to be"):
        ask(LabelDenoising("outputs"), jacobian, column, outputs=column, lipschitz=torch.ones(3))
