"""Random Fourier features: what is drawn, and the kernel that inner products estimate."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_netsim.functional import draw_frequencies, fourier_features
from tests import oracles
from tests.functional.common import random


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_row_is_a_frequency_by_a_loop() -> None:
    x, frequencies = random(0, 4, 3), random(1, 5, 3)
    found = fourier_features(x, frequencies)
    assert found.shape == (4, 10)
    for row in range(4):
        angles = [sum(float(w[k] * x[row, k]) for k in range(3)) for w in frequencies]
        wanted = [math.cos(a) / math.sqrt(5) for a in angles] + [math.sin(a) / math.sqrt(5) for a in angles]
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-14)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bandwidths", [0.7, (0.4, 1.0, 2.5)])
def test_inner_products_estimate_the_kernel_without_bias(bandwidths: float | tuple[float, ...]) -> None:
    x, y, source = random(2, 5, 3), random(3, 4, 3), generator()
    sigmas = (bandwidths,) if isinstance(bandwidths, float) else bandwidths
    wanted = torch.stack([torch.stack([oracles.gaussian(sigmas)(p, q) for q in y]) for p in x])
    draws = []
    for _ in range(600):
        frequencies = draw_frequencies(60, 3, bandwidths, source)
        draws.append(fourier_features(x, frequencies) @ fourier_features(y, frequencies).mT)
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert float(error.max()) < 0.01
    assert float(((found.mean(0) - wanted) / error).abs().max()) < 4


def test_frequencies_are_normal_numbers_over_the_bandwidth() -> None:
    frequencies = draw_frequencies(40_000, 2, 0.5, generator())
    assert frequencies.shape == (20_000, 2)
    assert frequencies.dtype == torch.float64
    assert float(frequencies.std()) == pytest.approx(2, rel=0.02)
    assert float(frequencies.mean()) == pytest.approx(0, abs=0.04)
    kurtosis = float((frequencies / 2).pow(4).mean())
    assert kurtosis == pytest.approx(3, rel=0.1)


def test_of_several_bandwidths_each_has_its_turn() -> None:
    one, several = (draw_frequencies(12, 4, bandwidths, generator(5)) for bandwidths in (1.0, (0.5, 1.0, 4.0)))
    scales = torch.tensor([0.5, 1, 4, 0.5, 1, 4]).double().unsqueeze(1)
    torch.testing.assert_close(several * scales, one, rtol=1e-14, atol=0)


def test_they_come_from_their_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (draw_frequencies(8, 3, 1.0, generator(seed)) for seed in (6, 6, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    source = generator(6)
    assert torch.equal(draw_frequencies(8, 3, 1.0, source), first)
    assert not torch.equal(draw_frequencies(8, 3, 1.0, source), first)
