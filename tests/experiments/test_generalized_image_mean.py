from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import generalized_image_mean, image_means
from experiments.generalized_image_mean import Arm, choose, compare
from experiments.image_means import draw_plain_warps, draw_shifts, draw_warps, mean_under, sharpness, sliced_distance
from experiments.vgg_weights import MEAN, STD, read_vgg_weights

WEIGHTS = "vgg19_normalised_conv3_1.pth"


def _photograph(height: int = 200, width: int = 260) -> Tensor:
    coarse = torch.rand(1, 3, height // 4, width // 4)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


class _Pull(nn.Module):
    """In place of a perceptual loss: the squared distance to a color, whatever the target."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - 0.25).square().mean()


def test_shifts_are_crops_up_to_four_pixels_off_the_center() -> None:
    photograph = _photograph()
    halved = F.avg_pool2d(photograph, 2)
    top, left = 50 - 16, 65 - 16
    crops = {
        (down, right): halved[:, top + down : top + down + 32, left + right : left + right + 32]
        for down in range(-4, 5)
        for right in range(-4, 5)
    }
    found = set()
    for target in draw_shifts(photograph, 32, 200, torch.Generator().manual_seed(0)):
        places = [place for place, crop in crops.items() if torch.allclose(crop, target, atol=1e-6)]
        assert len(places) == 1
        found |= set(places)
    assert {down for down, _ in found} == {right for _, right in found} == set(range(-4, 5))


def test_warps_move_what_is_in_the_center(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = _photograph()
    center = image_means.crop_center(F.avg_pool2d(photograph, 2), 48)
    warped = draw_plain_warps(photograph, 32, 5, torch.Generator().manual_seed(0))
    assert warped.shape == (5, 3, 32, 32)
    assert float((warped - center[:, 8:40, 8:40]).abs().mean(dim=(1, 2, 3)).min()) > 0.02
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.ones(shape))
    moved = draw_plain_warps(photograph, 32, 1, torch.Generator())
    torch.testing.assert_close(moved[0], center[:, 11:43, 11:43], rtol=0, atol=1e-4)


def test_warps_change_light_and_color() -> None:
    gray = torch.full((3, 200, 200), 0.5)
    targets = draw_warps(gray, 32, 400, torch.Generator().manual_seed(0))
    logarithms = (targets.mean(dim=(2, 3)) * 2).log()
    light, color = logarithms.mean(dim=1).std(), (logarithms - logarithms.mean(dim=1, keepdim=True)).std()
    assert float(light) == pytest.approx((0.1**2 + 0.03**2 / 3) ** 0.5, rel=0.15)
    assert float(color) == pytest.approx(0.03 * (2 / 3) ** 0.5, rel=0.15)
    torch.testing.assert_close(targets, targets.mean(dim=(2, 3), keepdim=True).expand_as(targets))


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


def test_no_step_leaves_the_mean() -> None:
    targets = torch.rand(7, 3, 4, 4)
    image, left = mean_under(_Pull(), targets, 0.1, 0, 0)
    torch.testing.assert_close(image, targets.mean(dim=0), rtol=0, atol=1e-5)
    assert left == pytest.approx({"loss": 1.0, "pixels": 1.0}, rel=1e-4)


@pytest.mark.parametrize("loss", ["MMD", "MMD++", "S-CNN", "VGG R", "VGG RSN"])
def test_each_loss_is_made_smaller(loss: str) -> None:
    targets = draw_shifts(_photograph(), 36, 10, torch.Generator().manual_seed(0))
    _, left = mean_under(Arm(loss, 0.01).build({}, 0), targets, 0.01, 10, 0)
    assert left["loss"] < 0.98
    assert left["pixels"] > 1


def test_arms_are_what_their_letters_say() -> None:
    images = torch.rand(1, 3, 36, 36), torch.rand(1, 3, 36, 36)
    for name, is_redrawn, is_normalized in (("R", False, False), ("RN", False, True), ("RS", True, False), ("RSN", True, True)):
        loss = Arm(f"VGG {name}").build({}, 0)
        values = [float(loss(*images)) for _ in range(2)]
        assert (values[0] != values[1]) is is_redrawn
        assert loss.normalize is is_normalized
    plain, extended = (Arm(name, bandwidth=0.7).build({}, 0) for name in ("MMD", "MMD++"))
    assert (plain.remove_mean, plain.local_weight, plain.bandwidth) == (False, 0.0, 0.7)
    assert (extended.remove_mean, extended.local_weight, extended.bandwidth) == (True, 0.025, 0.7)


def test_one_target_of_each_set_is_drawn_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    class Recorder:
        def __init__(self, **options: int) -> None:
            pass

        def update(self, images: Tensor, real: bool) -> None:
            seen[real].append(images[:, 0, 0, 0])

        def compute(self) -> dict[str, float]:
            return {"swd": float(len(seen[True]))}

    monkeypatch.setattr(image_means, "SlicedWassersteinDistance", Recorder)
    targets = torch.arange(15.0).view(3, 5, 1, 1, 1)
    assert sliced_distance(torch.full((3, 1, 1, 1), -1.0), targets, 5) == {"swd": pytest.approx(3.0)}
    assert all(torch.equal(images, torch.full((3,), -1.0)) for images in seen[False])
    drawn = torch.stack(seen[True], dim=1)
    assert torch.equal(drawn.sort(dim=1).values, targets.view(3, 5))
    assert not torch.equal(drawn - drawn[:, :1], (drawn - drawn[:, :1])[:1].expand(3, 5)), "drawn set by set"


def test_blurred_images_are_far_from_the_targets() -> None:
    photographs = [(torch.rand(1, 25, 32) > 0.5).float().repeat_interleave(8, 1).repeat_interleave(8, 2) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    targets = torch.stack([draw_shifts(some.expand(3, -1, -1), 36, 5, generator) for some in photographs])
    sharp, blurred = targets[:, 0], targets.mean(dim=1)
    distances = [sliced_distance(images, targets[:, 1:], 3) for images in (sharp, blurred)]
    assert set(distances[0]) == {"swd", "swd_36", "swd_18"}
    assert distances[1]["swd_36"] > 1.1 * distances[0]["swd_36"]


def test_sharpness_is_relative_to_the_targets() -> None:
    targets = torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1)
    assert sharpness(targets[0], targets) == pytest.approx(1.0)
    assert sharpness(0.5 * targets[0] + 0.2, targets) == pytest.approx(0.5, rel=1e-4)
    assert sharpness(torch.full((3, 32, 32), 0.5), targets) < 1e-5


def test_settings_are_chosen_on_photographs_that_are_not_judged() -> None:
    asked = set()

    class FakeRuns:
        def of(self, arm: Arm, family: str, photograph: int) -> dict[str, float]:
            asked.add((family, photograph))
            bandwidth = 0.0 if arm.loss == "S-CNN" else abs(arm.bandwidth - 0.54)
            return {"swd": abs(arm.weight - 0.03) + bandwidth}

    held_out = generalized_image_mean.HELD_OUT[:2]
    for loss, expected in (("MMD++", Arm("MMD++", 0.03, 0.54)), ("S-CNN", Arm("S-CNN", 0.03))):
        assert choose(FakeRuns(), loss, ("shifts", "warps"), held_out, (0.003, 0.03, 0.3)) == expected
    assert asked == {(family, photograph) for family in ("shifts", "warps") for photograph in held_out}
    assert not set(generalized_image_mean.JUDGED) & set(generalized_image_mean.HELD_OUT)
    assert set(generalized_image_mean.JUDGED) | set(generalized_image_mean.HELD_OUT) == set(range(1, 25))


def test_differences_are_taken_set_by_set() -> None:
    rows = {"MMD": (1.0, 2.0, 3.0), "L2": (1.5, 2.5, 2.0)}
    found = {name: {"each": [{"swd": value} for value in values]} for name, values in rows.items()}
    assert compare(found, [("MMD", "L2"), ("MMD++", "L2")]) == {"MMD − L2": [0.0, 0.5, 2]}


def test_folded_weights_are_those_of_the_original(data_dir: Path) -> None:
    path = data_dir / "weights" / WEIGHTS
    if not path.is_file():
        pytest.skip(f"needs weights/{WEIGHTS} in the directory of real data")
    state = {name: value.double() for name, value in torch.load(path, weights_only=True).items()}
    folded = {name: value.double() for name, value in read_vgg_weights(path).items()}
    image = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    original = F.conv2d(image, state["0.weight"], state["0.bias"])
    ours = (image - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    margin = 0
    for here, there in ((2, 0), (5, 2), (9, 5), (12, 7), (16, 10)):
        original = F.conv2d(
            F.pad(original, (1, 1, 1, 1), mode="reflect"), state[f"{here}.weight"], state[f"{here}.bias"]
        ).relu()
        ours = F.conv2d(ours, folded[f"features.{there}.weight"], folded[f"features.{there}.bias"], padding=1).relu()
        margin += 1
        inside = slice(margin, -margin)
        torch.testing.assert_close(ours[..., inside, inside], original[..., inside, inside], rtol=0, atol=1e-5)
        assert float(original.mean()) > 0.1, "there is something to compare"
        if there in (2, 7):
            original, ours = F.max_pool2d(original, 2), F.max_pool2d(ours, 2)
            margin = (margin + 1) // 2


def test_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `data_dir` to be a directory with kodak/kodim01.png"):
        generalized_image_mean.main(["--quick", "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"Expected `weights` to be a file with .* which does not exist"):
        read_vgg_weights(tmp_path / "nowhere.pth")
    torch.save({"0.weight": torch.ones(3, 3, 1, 1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"Expected `weights` to be a state dict .* one without 0.bias"):
        read_vgg_weights(tmp_path / "other.pth")


def test_quick_run_prints_its_figures_and_repeats_no_run(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (data_dir / "kodak").is_dir() or not (data_dir / "weights" / WEIGHTS).is_file():
        pytest.skip(f"needs kodak/ and weights/{WEIGHTS} in the directory of real data")
    monkeypatch.setattr(generalized_image_mean, "PATCHES", 32)
    monkeypatch.setattr(generalized_image_mean, "BANDWIDTHS", (0.63,))
    arguments = ["--quick", "--steps", "1", "--sets", "1", "--data-dir", str(data_dir), "--out", str(tmp_path)]
    figures = generalized_image_mean.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for family in ("shifts", "warps"):
        assert figures["swd"][family].keys() == {"target", "L2", *generalized_image_mean.MAIN}
        assert figures["grid"]["swd"][family].keys() == {"target", "L2", *generalized_image_mean.GRID}
        assert all(0 < value < 1 for value in figures["swd"][family].values())
    assert {path.name for path in tmp_path.iterdir()} == {
        "losses_shifts_warps.png",
        "vgg_networks_shifts_warps.png",
        "runs.csv",
        "images",
    }
    log = (tmp_path / "runs.csv").read_text()
    assert generalized_image_mean.main(arguments) == figures
    assert (tmp_path / "runs.csv").read_text() == log
