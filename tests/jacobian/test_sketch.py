"""Sketches: unbiased, of the stated variance, and the same numbers whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_netsim.jacobian import SketchProjection, factors
from lightning_netsim.jacobian.embedding import EmbeddingFactor
from lightning_netsim.jacobian.factors import DenseFactor, OuterFactor
from tests.jacobian.shared import jacobian

#: Shape and width of a matrix, and into how many blocks it is cut: None where no fast convolution fits.
MATRICES = [
    ((40, 60), 200, (1, 1)),
    ((60, 90), 48, (3, 2)),
    ((20, 90), 40, (1, 3)),
    ((53, 31), 32, (53, 1)),
    ((9, 4), 32, (1, 1)),
    ((40, 60), 201, (1, 1)),
    ((67, 90), 48, None),
    ((7, 5), 19, None),
    ((20, 30), 600, None),
]


def projection_of(shape: tuple[int, ...], width: int, seed: int = 0) -> SketchProjection:
    """Return a projection that gives one tensor, `w`, about the width, beside another that is kept exactly."""
    return SketchProjection({"w": torch.Size(shape), "b": torch.Size(())}, width + 1, seed, energy={"w": 1.0, "b": 1 / width})


@pytest.mark.parametrize("name", ["mlp_2", "positions", "embedding"])
def test_sketch_keeps_inner_products_in_expectation(name: str) -> None:
    result = jacobian(name)
    wanted = result.inner(result)
    draws = []
    for seed in range(400):
        sketched = result.sketch(SketchProjection(result.shapes, 31, seed))
        draws.append(torch.einsum("iak,jbk->ijab", sketched, sketched))
    estimates = torch.stack(draws)
    error = (estimates.mean(0) - wanted).abs() / (estimates.std(0) / 20).clamp_min(1e-9 * wanted.abs().max())
    assert float(error.max()) < 5


@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize(("shape", "width"), [((64, 256), 300), ((64, 256), 120), ((256, 64), 300), ((31, 77), 99)])
def test_the_error_of_outer_products_is_unbiased_and_of_the_stated_variance(
    shape: tuple[int, int], width: int, cosine: float
) -> None:
    """Of unit gradients with inner product k, the estimate has the mean k and the variance (1 + k²)/K."""
    pairs = []
    for size in shape:
        first, second = torch.linalg.qr(torch.randn(size, 2, dtype=torch.float64)).Q.T
        pairs.append(torch.stack([first, cosine * first + (1 - cosine**2) ** 0.5 * second]))
    gradients = (pairs[0][:, :, None] * pairs[1][:, None]).flatten(1).unsqueeze(1)
    estimates = []
    for seed in range(300):
        projection = projection_of(shape, width, seed)
        left, right = projection.apply("w", gradients)[:, 0]
        estimates.append(left @ right)
    errors = torch.stack(estimates) - cosine**2
    deviation = ((1 + cosine**4) / projection.widths["w"]) ** 0.5
    assert abs(float(errors.mean())) < 4 * deviation / 300**0.5
    assert 0.8 < float(errors.std()) / deviation < 1.2


@pytest.mark.parametrize(("shape", "width", "blocks"), MATRICES)
def test_every_way_to_a_sketch_gives_the_same_numbers(
    shape: tuple[int, int], width: int, blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = projection_of(shape, width)
    assert projection.blocks("w") == blocks
    outer = OuterFactor(torch.randn(3, 2, shape[1]).double(), torch.randn(3, 2, 2, shape[0]).double())
    wanted = projection.apply("w", outer.dense())
    assert wanted.shape == (3, 2, projection.widths["w"])
    torch.testing.assert_close(outer.sketch(projection, "w"), wanted)
    torch.testing.assert_close(outer.formed().sketch(projection, "w"), wanted)
    if blocks is not None:
        torch.testing.assert_close(projection.convolve("w", *outer.parts), wanted)
    monkeypatch.setattr(factors, "_CACHED_BYTES", {"cpu": 1})
    monkeypatch.setattr(OuterFactor, "_convolution_is_cheaper", lambda *_: False)
    torch.testing.assert_close(outer.sketch(projection, "w"), wanted)
    index = torch.tensor([[1, 2, 1], [0, 0, -1], [4, 5, 6]])
    deltas = torch.randn(3, 2, 3, shape[1]).double() * (index >= 0)[:, None, :, None]
    table = EmbeddingFactor(index, deltas, shape[0])
    torch.testing.assert_close(table.sketch(projection, "w"), projection.apply("w", table.dense()))


def test_no_sample_and_no_position() -> None:
    projection = projection_of((40, 60), 200)
    for factor in (
        OuterFactor(torch.zeros(0, 300, 60), torch.zeros(0, 2, 300, 40)),
        DenseFactor(torch.zeros(0, 2, 40, 60)),
        EmbeddingFactor(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2, 3, 60), 40),
    ):
        assert factor.sketch(projection, "w").shape == (0, 2, 200)


def test_sketch_is_exact_when_everything_fits() -> None:
    result = jacobian("mlp_2")
    projection = SketchProjection(result.shapes, result.num_parameters)
    assert projection.is_exact
    assert projection.dim == result.num_parameters
    assert torch.equal(result.sketch(projection), result.materialize())


def test_signs_come_from_a_private_generator_and_the_seed_alone() -> None:
    gradients = torch.ones(1, 1, 2400)

    def drawn(seed: int) -> Tensor:
        return projection_of((40, 60), 200, seed).apply("w", gradients)

    state = torch.get_rng_state()
    first = drawn(0)
    torch.randn(3)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)
    torch.set_rng_state(state)
    drawn(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_widths_fit_and_cover() -> None:
    shapes = {"a": torch.Size((100, 100)), "b": torch.Size((100,)), "c": torch.Size((5, 10, 60)), "d": torch.Size(())}
    projection = SketchProjection(shapes, 500)
    assert projection.dim <= 500
    assert projection.widths["d"] == 1
    assert not projection.is_exact
    # Shares follow the energy; a tensor that fits into its share is kept exactly, and none is left out.
    energetic = SketchProjection(shapes, 500, energy={"a": 1.0, "b": 8.0, "c": 1.0, "d": 0.0})
    assert energetic.dim <= 500
    assert energetic.widths["b"] == 100
    # A matrix has a width for fast transforms, at most a tenth below its share; another tensor an odd one.
    assert 0.9 * 199 < energetic.widths["a"] == 196
    assert energetic.widths["c"] == 199
    assert energetic.widths["d"] == 1
    with pytest.raises(ValueError, match="projection_dim"):
        SketchProjection(shapes, 1)
