"""Distances of images: generalized means, super-resolution, kernels, forced choice."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from experiments.images import generalized_image_mean, kernel_equivalence, super_resolution, two_afc
from experiments.images.generalized_image_mean import (
    draw_plain_warps,
    draw_shifts,
    mean_under,
)
from experiments.images.kernel_equivalence import check_features, check_networks, load_pairs, scaled, smooth_noise
from experiments.images.two_afc import Judgments, agreement_table, read_live, two_afc_score, weighted_agreement
from experiments.images.vgg_weights import read_vgg_weights
from lab.networks import IMAGENET_MEAN, IMAGENET_STD
from lightning_netsim.functional import gaussian_kernel, squared_mmd


def _photograph(height: int = 200, width: int = 260) -> Tensor:
    coarse = torch.rand(1, 3, height // 4, width // 4)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


class _Pull(nn.Module):
    """In place of a perceptual loss: the squared distance to a color, whatever the target."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - 0.25).square().mean()


def test_shifts_are_crops_up_to_four_pixels_off_the_center() -> None:
    photograph = _photograph()
    halved, top, left = F.avg_pool2d(photograph, 2), 50 - 16, 65 - 16
    places = list(itertools.product(range(-4, 5), repeat=2))
    crops = {(y, x): halved[:, top + y : top + y + 32, left + x : left + x + 32] for y, x in places}
    found = [
        [place for place, crop in crops.items() if torch.allclose(crop, target, atol=1e-6)]
        for target in draw_shifts(photograph, 32, 100, torch.Generator().manual_seed(0))
    ]
    assert all(len(some) == 1 for some in found)
    for axis in range(2):
        assert {some[0][axis] for some in found} == set(range(-4, 5))


def test_warps_move_what_is_in_the_center(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = _photograph()
    center = generalized_image_mean.crop_center(F.avg_pool2d(photograph, 2), 48)
    warped = draw_plain_warps(photograph, 32, 5, torch.Generator().manual_seed(0))
    assert float((warped - center[:, 8:40, 8:40]).abs().mean(dim=(1, 2, 3)).min()) > 0.02
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.ones(shape))
    moved = draw_plain_warps(photograph, 32, 1, torch.Generator())
    torch.testing.assert_close(moved[0], center[:, 11:43, 11:43], rtol=0, atol=1e-4)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_minimum_is_found(weight: float) -> None:
    targets = 0.5 + 0.2 * torch.rand(10, 3, 4, 4)
    mean = targets.mean(dim=0)
    scale, spread = (mean - 0.25).square().mean(), (targets - mean).square().mean()
    expected = (0.25 / scale + weight * mean / spread) / (1 / scale + weight / spread)
    image, left = mean_under(_Pull(), targets, weight, 300, 0)
    torch.testing.assert_close(image, expected, rtol=0, atol=0.02)
    assert left["loss"] == pytest.approx(float((image - 0.25).square().mean() / scale), rel=1e-4)
    assert left["pixels"] == pytest.approx(float((image - targets).square().mean() / spread), rel=1e-4)
    image, left = mean_under(_Pull(), targets, weight, 0, 0)
    torch.testing.assert_close(image, mean, rtol=0, atol=1e-5)
    assert left == pytest.approx({"loss": 1.0, "pixels": 1.0}, rel=1e-4)


def test_folded_weights_are_those_of_the_original(tmp_path: Path) -> None:
    shapes = {0: (3, 3, 1), 2: (8, 3, 3), 5: (8, 8, 3), 9: (8, 8, 3), 12: (8, 8, 3), 16: (8, 8, 3)}
    state = {f"{place}.weight": torch.randn(*shape, shape[-1]) / 3 for place, shape in shapes.items()}
    state |= {f"{place}.bias": torch.randn(shape[0]) for place, shape in shapes.items()}
    torch.save(state, tmp_path / "vgg.pth")
    folded = read_vgg_weights(tmp_path / "vgg.pth")
    image = torch.rand(2, 3, 12, 12)
    original = F.conv2d(F.conv2d(image, state["0.weight"], state["0.bias"]), state["2.weight"], state["2.bias"])
    mean, std = (torch.tensor(some).view(3, 1, 1) for some in (IMAGENET_MEAN, IMAGENET_STD))
    ours = F.conv2d((image - mean) / std, folded["features.0.weight"], folded["features.0.bias"])
    torch.testing.assert_close(ours, original, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded["features.10.weight"], state["16.weight"])
    with pytest.raises(ValueError, match="which does not exist"):
        read_vgg_weights(tmp_path / "nowhere.pth")
    torch.save({"0.weight": torch.ones(3, 3, 1, 1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"one without 0\.bias"):
        read_vgg_weights(tmp_path / "other.pth")


def test_tiles_hold_every_pixel_once() -> None:
    image = torch.arange(512 * 768.0).view(1, 512, 768).expand(3, 512, 768)
    cut = super_resolution.tiles(image)
    assert torch.equal(cut[:, 0].flatten().sort().values, image[0].flatten())
    assert torch.equal(cut[1], image[:, :256, 256:512])


def test_deviations_and_their_slope() -> None:
    exact = torch.tensor([2.0, 4.0], dtype=torch.float64)
    found = kernel_equivalence.deviations(torch.tensor([[2.2, 4.0], [2.2, 3.2]]), exact)
    assert found["error"] == pytest.approx(math.sqrt((0.01 + 0 + 0.01 + 0.04) / 4), rel=1e-5)
    assert found["bias"] == pytest.approx(0.1, rel=1e-5)
    assert found["mean"] == pytest.approx(0, abs=1e-7)
    series = {width: {"error": 3 / math.sqrt(width)} for width in (64, 100, 500)}
    assert kernel_equivalence.slope(series) == pytest.approx(-0.5)


def test_similarity_before_pooling_is_that_of_patches_at_the_same_place() -> None:
    first, second = (smooth_noise(1, 9, seed) for seed in (0, 1))
    found = []
    for row, column in itertools.product(range(7), repeat=2):
        p, q = (scaled(image)[0, :, row : row + 3, column : column + 3].flatten() for image in (first, second))
        angle = math.acos(float(p @ q / (p.norm() * q.norm())))
        found.append((math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi)
    assert kernel_equivalence.local_similarity(first, second, depth=1).tolist() == pytest.approx([sum(found) / 49])


def test_errors_fall_with_width_and_number() -> None:
    pairs = load_pairs(None, count=2)
    assert torch.equal(pairs[0][:2, :, :, 4:], pairs[1][:2, :, :, :-4]), "moved by four pixels"
    networks = check_networks(pairs, widths=[16, 256], draws=4)
    for series in (*networks.values(), check_features(pairs, numbers=[16, 256], draws=8)):
        small, large = series.values()
        assert large["error"] < 0.6 * small["error"]
        assert large["error"] < 0.3, "it is the same distance, not one of the same order"


def test_rescaled_kernels_fall_with_depth() -> None:
    _, kernels = kernel_equivalence.rescaled_kernels()
    assert kernels[:, 0].tolist() == pytest.approx([1.0] * len(kernels))
    assert kernels[:, -1].tolist() == pytest.approx([0.0] * len(kernels))
    assert float(kernels[:, 1:-1].diff(dim=0).max()) < 0


def test_distance_from_a_mixture_is_that_from_the_patches_of_both() -> None:
    image, *textures = smooth_noise(3, 34, seed=0)  # A single window.
    kernel = partial(gaussian_kernel, bandwidths=0.6)
    own, first, second = (F.unfold(scaled(some.unsqueeze(0)), 3)[0].mT for some in (image, *textures))
    others = {"mixture": torch.cat([first, second]), "first": first, "second": second}
    unit = squared_mmd(first, second, kernel)
    expected = {name: float(squared_mmd(own, some, kernel) / unit) for name, some in others.items()}
    assert kernel_equivalence.mixture_distances(image, torch.stack(textures), kernel) == pytest.approx(expected, abs=1e-9)


def test_score_of_a_triplet() -> None:
    first, second, preference = torch.tensor([[1, 2, 0.2], [2, 1, 0.2], [1, 1, 0.2], [1, 2, 0.9]]).unbind(1)
    assert two_afc_score(first, second, preference).tolist() == pytest.approx([0.8, 0.2, 0.5, 0.1])


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Return a directory with three references and images of each: a copy, three that are worse, and one of them again."""
    folder, rows = tmp_path / "live", []
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(60, 180, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"ref_{number}.png")
        for level in range(4):
            Image.fromarray(pixels + np.uint8(10 * level)).save(folder / f"{number}_{level}.png")
            rows.append((f"ref_{number}.png", f"{number}_{level}.png", 0.2 * level if number != 1 else 0.1 * (4 - level)))
    Image.open(folder / "0_3.png").save(folder / "0_again.png")
    rows.append(("ref_0.png", "0_again.png", 0.5))
    pd.DataFrame(rows, columns=["reference", "file", "dmos_scaled"]).to_csv(folder / "scores.csv", index=False)
    return tmp_path


def test_copies_are_left_out_and_equal_images_are_one(live: Path) -> None:
    judgments = read_live(live, least_gap=0.05)
    assert [image.name for _, image in judgments.pairs] == [f"{i}_{level}.png" for i in range(3) for level in (1, 2, 3)]
    assert judgments.scores == pytest.approx([0.2, 0.4, 0.55, 0.3, 0.2, 0.1, 0.2, 0.4, 0.6])
    assert judgments.owners.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for (first, second), preference in zip(judgments.triplets.tolist(), judgments.preference.tolist(), strict=True):
        assert preference == float(judgments.scores[first] > judgments.scores[second])
    gaps = torch.tensor([abs(one - other) for one, other in itertools.combinations(judgments.scores, 2)])
    assert len(judgments.triplets) == int((gaps >= 0.05 - 1e-6).sum()), "0.55 and 0.6 are 0.05 apart"
    assert len(read_live(live, least_gap=0.0).triplets) == int((gaps > 1e-6).sum()), "equal scores say nothing"
    found = two_afc.rank_correlations(torch.tensor([[1.0, 2, 3, 1, 2, 3, 1, 2, 3]]), judgments)
    assert found["spearman_within"] == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 0, 1), (3, 1, 0)])
def test_agreement_with_references_drawn_several_times(within: bool, weights: tuple[int, ...]) -> None:
    owners, scores = [0, 0, 0, 1, 1, 2, 2], []
    pairs = [(Path(f"r{owner}"), Path(str(place))) for place, owner in enumerate(owners)]
    triplets = torch.tensor(list(itertools.combinations(range(len(owners)), 2)))
    judgments = Judgments(pairs, triplets, torch.rand(len(triplets), dtype=torch.float64))
    distances = torch.randint(4, (3, len(owners))).double()
    for (first, second), preference in zip(triplets.tolist(), judgments.preference.tolist(), strict=True):
        left, right = owners[first], owners[second]
        if (left == right) == within:
            for draw in distances.tolist():
                share = 1 - preference if draw[first] < draw[second] else preference if draw[second] < draw[first] else 0.5
                scores += [share] * (weights[left] if within else weights[left] * weights[right])
    found = weighted_agreement(*agreement_table(distances, judgments), torch.tensor([weights]).double(), within)
    assert found.tolist() == pytest.approx([sum(scores) / len(scores)])
