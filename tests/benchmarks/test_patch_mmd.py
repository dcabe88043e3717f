from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import patch_mmd
from benchmarks.patch_mmd import AutogradPatchMMD, both_gradients, largest_disagreement, natural_images
from lightning_netsim.functional import exact_patch_mmd, gaussian_kernel, squared_mmd
from tests.benchmarks.conftest import NOWHERE

SMALL = [
    "--images",
    "1",
    "--side",
    "40",
    "--features",
    "64",
    "--draws",
    "6",
    "--batch",
    "9",
    "--samples",
    "20",
    "--rounds",
    "1",
]
SMALL += ["--threads", "1", "--data-dir", NOWHERE]

Loss = Callable[[Tensor, Tensor], Tensor]


def weigh_nothing(names: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Stand in for fresh processes, which take seconds to start."""
    return dict.fromkeys(names, float(options.side))


def twice_half(bandwidth: float) -> dict[str, Loss]:
    """Stand in for geomloss, which need not be installed."""
    ours = partial(squared_mmd, kernel=partial(gaussian_kernel, bandwidths=bandwidth))

    def other(x: Tensor, y: Tensor) -> Tensor:
        kernel = partial(gaussian_kernel, bandwidths=bandwidth)
        return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()

    return {"ours": ours, "geomloss": other}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_mmd, "peaks", weigh_nothing)
    monkeypatch.setattr(patch_mmd, "EXACT_SIDE", 36)
    network = patch_mmd.VGGLoss
    monkeypatch.setattr(patch_mmd, "VGGLoss", lambda mode: network(mode=mode, layers=["conv1_1"]))


def test_quick_run_prints_its_figures(small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_mmd.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(patch_mmd, "kernel_norms", twice_half)
    figures = patch_mmd.main(["--quick", *SMALL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for name in patch_mmd.BOUNDS:
        assert figures[name] > 0
    assert figures["median_seconds"].keys() == {"ours_64", "ours_128", "ours_256", "autograd_64", "vgg19"}
    assert figures["peak_mb"] == figures["peak_megabytes"]["ours_64"] == 40
    assert figures["rff_error"] == max(value for name, value in figures["errors"].items() if name.startswith("ours"))
    assert figures["errors"].keys() == figures["spreads"].keys()
    assert figures["ratio_geomloss"] == max(figures["ratios_geomloss"].values())
    assert figures["ratios_geomloss"].keys() == {"9", "20"}
    assert figures["disagreement_geomloss"] < 1e-12


def test_without_geomloss_nothing_is_said_of_it(
    small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_mmd.importlib.util, "find_spec", lambda name: None)
    figures = patch_mmd.main(SMALL)
    assert "geomloss is not installed: not compared." in capsys.readouterr().out
    assert figures["ratio_geomloss"] is None
    assert figures["held"].keys() == {"speedup_vgg19", "peak_mb", "rff_error"}


def test_twice_the_norm_of_geomloss_is_the_mmd() -> None:
    pytest.importorskip("geomloss", reason="geomloss is installed by the extra bench")
    x, y, bandwidth = patch_mmd.sets(30)
    losses = patch_mmd.kernel_norms(bandwidth)
    assert largest_disagreement(losses, x, y) < 1e-12
    wrong = losses | {"geomloss": lambda x, y: 1.01 * losses["ours"](x, y)}
    assert largest_disagreement(wrong, x, y) == pytest.approx(0.01, rel=1e-6)


def test_both_sets_have_gradients() -> None:
    x, y, bandwidth = patch_mmd.sets(5)
    value, *gradients = both_gradients(twice_half(bandwidth)["geomloss"], x.double(), y.double())
    step = 1e-6 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for place, gradient in enumerate(gradients):
        moved = [x.double(), y.double()]
        moved[place] = moved[place] + step
        change = twice_half(bandwidth)["geomloss"](*moved) - value
        assert float(change) == pytest.approx(float((gradient * step).sum()), rel=1e-3)


def test_the_form_with_phases_estimates_the_exact_mmd() -> None:
    input, target = natural_images(2, 36, seed=3).split(1)
    kernel = partial(gaussian_kernel, bandwidths=patch_mmd.BANDWIDTH)
    exact = float(exact_patch_mmd(2 * input - 1, 2 * target - 1, kernel))
    draws = torch.stack([AutogradPatchMMD(1024, seed)(input, target) for seed in range(10)])
    assert float(draws.mean()) == pytest.approx(exact, rel=0.1)


def test_a_method_that_computes_something_else_is_refused(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(AutogradPatchMMD):
        def __call__(self, input: Tensor, target: Tensor) -> Tensor:
            return super().__call__(input, target) / 2

    monkeypatch.setattr(patch_mmd, "AutogradPatchMMD", Half)
    with pytest.raises(RuntimeError, match=r"autograd: the mean of 20 draws is off by [45]"):
        patch_mmd.measure_error(argparse.Namespace(features=512, draws=20))


def test_amplitudes_of_images_fall_with_the_frequency() -> None:
    images = natural_images(20, 64, seed=0)
    assert images.shape == (20, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert not torch.equal(images, natural_images(20, 64, seed=1))
    amplitudes = torch.fft.rfft2(images).abs().mean((0, 1))
    low, high = float(amplitudes[2:5, 2:5].mean()), float(amplitudes[16:19, 16:19].mean())
    assert low / high == pytest.approx(17 / 3, rel=0.25)


def test_memory_is_measured_in_a_fresh_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Sequence[str]] = []

    def start(script: str, runs: Sequence[Sequence[str]]) -> list[float]:
        started.extend(runs)
        return [patch_mmd.main(arguments)["megabytes"] for arguments in runs]

    monkeypatch.setattr(patch_mmd.common, "peaks_megabytes", start)
    parser = patch_mmd.common.make_parser(None, patch_mmd.SIZES)
    options = patch_mmd.common.read_arguments(parser, patch_mmd.SIZES, ["--quick", "--threads", "1"])
    found = patch_mmd.peaks(["ours_64"], options)
    assert [*started[0][:3]] == ["--measure-memory", "ours_64", "--images=2"]
    assert json.loads(capsys.readouterr().out) == {"megabytes": found["ours_64"]}
