from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments import kernel_equivalence
from experiments.kernel_equivalence import (
    check_features,
    check_networks,
    deviations,
    load_pairs,
    load_textures,
    local_similarity,
    mixture_distances,
    rescaled_kernels,
    scaled,
    sliced_distances,
    slope,
    smooth_noise,
)
from lightning_netsim.functional import gaussian_kernel, squared_mmd

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_pairs_are_moved_and_others() -> None:
    first, second = load_pairs(None, count=3)
    assert first.shape == second.shape == (6, 3, 26, 26)
    assert torch.equal(first[:3, :, :, 4:], second[:3, :, :, :-4])
    assert torch.equal(second[3:], first[[2, 0, 1]])
    images = smooth_noise(2, 64, seed=0)
    assert images.amin() == 0
    assert images.amax() == 1
    assert float(images.diff(dim=3).abs().mean()) < 0.15 * float(images.amax() - images.amin())


@pytest.mark.skipif(not (DATA / "kodak").is_dir(), reason="the Kodak photographs are not at hand")
def test_crops_of_photographs() -> None:
    photographs = kernel_equivalence.read_photographs(DATA)
    first, second = load_pairs(photographs, count=4)
    assert first.shape == (8, 3, 26, 26)
    assert torch.equal(first[:4, :, :, 4:], second[:4, :, :, :-4])
    for pair in load_textures(photographs).values():
        assert pair.shape == (2, 3, 64, 64)


def test_deviations_and_their_slope() -> None:
    exact = torch.tensor([2.0, 4.0], dtype=torch.float64)
    found = deviations(torch.tensor([[2.2, 4.0], [2.2, 3.2]]), exact)
    assert found["error"] == pytest.approx(math.sqrt((0.01 + 0 + 0.01 + 0.04) / 4), rel=1e-5)
    assert found["bias"] == pytest.approx(0.1, rel=1e-5)
    assert found["mean"] == pytest.approx(0, abs=1e-7)
    assert slope({width: {"error": 3 / math.sqrt(width)} for width in (64, 100, 500)}) == pytest.approx(-0.5)


def test_similarity_before_pooling_is_that_of_patches_at_the_same_place() -> None:
    first, second = (smooth_noise(1, 9, seed) for seed in (0, 1))
    found = []
    for row in range(7):
        for column in range(7):
            p, q = (scaled(image)[0, :, row : row + 3, column : column + 3].flatten() for image in (first, second))
            angle = math.acos(float(p @ q / (p.norm() * q.norm())))
            found.append((math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi)
    assert local_similarity(first, second, depth=1).tolist() == pytest.approx([sum(found) / 49])


def test_errors_fall_with_width_and_number() -> None:
    pairs = load_pairs(None, count=2)
    networks = check_networks(pairs, widths=[16, 256], draws=4)
    features = check_features(pairs, numbers=[16, 256], draws=8)
    for series in (*networks.values(), features):
        small, large = series.values()
        assert large["error"] < 0.6 * small["error"]
        assert large["error"] < 0.3, "it is the same distance, not one of the same order"
    assert max(series[256]["kernel"] for series in networks.values()) < 0.05


def test_kernels_are_rescaled_and_fall_with_depth() -> None:
    angles, kernels = rescaled_kernels()
    assert angles[0] == 0
    assert angles[-1] == pytest.approx(math.pi)
    assert kernels[:, 0].tolist() == pytest.approx([1.0] * len(kernels))
    assert kernels[:, -1].tolist() == pytest.approx([0.0] * len(kernels))
    assert (kernels.diff(dim=1) <= 0).all(), "of a larger angle it is smaller"
    assert (kernels[:, 1:-1].diff(dim=0) < 0).all()


def test_distance_from_the_mixture_is_that_from_the_patches_of_both() -> None:
    image, *textures = smooth_noise(3, 34, seed=0)
    kernel = partial(gaussian_kernel, bandwidths=0.6)
    own, first, second = (
        scaled(some).unfold(1, 3, 1).unfold(2, 3, 1).flatten(1, 2).transpose(0, 1) for some in (image, *textures)
    )
    own, first, second = (patches.flatten(1) for patches in (own, first, second))
    assert len(own) == 32 * 32, "a single window"
    unit = squared_mmd(first, second, kernel)
    expected = {
        "mixture": squared_mmd(own, torch.cat([first, second]), kernel) / unit,
        "first": squared_mmd(own, first, kernel) / unit,
        "second": squared_mmd(own, second, kernel) / unit,
    }
    found = mixture_distances(image, torch.stack(textures), kernel)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-9)


def test_an_image_of_both_textures_is_near_to_the_mixture() -> None:
    textures = torch.stack([torch.full((3, 40, 40), 0.2), torch.full((3, 40, 40), 0.8)])
    both = torch.cat([textures[0, :, :20], textures[1, :, 20:]], dim=1)
    near, far = (sliced_distances(image, textures) for image in (both, textures.mean(0)))
    assert near["mixture"] < 0.1
    assert far["mixture"] == pytest.approx(0.5, abs=1e-6)
    assert near["first"] == pytest.approx(0.5, abs=0.05)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_equivalence, "TEXTURE", 34)  # A single window.
    monkeypatch.setattr(kernel_equivalence, "MIXTURE_WIDTH", 32)
    monkeypatch.setattr(kernel_equivalence, "MIXTURE_FEATURES", 128)


def test_the_minimizer_comes_nearer_to_the_mixture(small: None) -> None:
    (textures,) = load_textures(None).values()
    found, images = kernel_equivalence.check_mixture(textures, steps=40)
    assert images.keys() == set(kernel_equivalence.LOSSES)
    for name in kernel_equivalence.LOSSES:
        assert found[name]["minimizer"]["mixture"] < 0.7 * found[name]["mean"]["mixture"]
        first, second = (found[name]["minimizer"][key] for key in ("first", "second"))
        assert (first + second) / 2 - 0.25 == pytest.approx(found[name]["minimizer"]["mixture"], abs=1e-9)


def test_quick_run_prints_its_figures(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--widths", "8", "32", "--draws", "2", "--steps", "2", "--out", str(tmp_path)]
    figures = kernel_equivalence.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["network"].keys() == figures["network_slope"].keys() == {"1", "2", "3"}
    assert figures["features"].keys() == {"64", "512"}
    assert figures["rise_with_depth"] < 0
    assert figures["mixture"].keys() == {"bars, clouds"}
    assert [path.name for path in tmp_path.iterdir()] == ["kernel_equivalence.png"]
