from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from experiments import super_resolution
from experiments.super_resolution import Bicubic, Photographs, Runs, Setting, judge, tiles
from lightning_netsim.demos.photographs import RandomCrops
from lightning_netsim.losses import PatchMMDLoss, VGGLoss

SMALL = ["--quick", "--start-steps", "2", "--steps", "2", "--patches", "4"]


def _differ(left: nn.Module, right: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def _runs(path: Path, extra: list[str] | None = None) -> Runs:
    options = super_resolution.read_arguments([*SMALL, "--data-dir", "", *(extra or [])])
    photographs = [torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8) for _ in range(3)]
    return Runs(path, Photographs(*([one] for one in photographs), ["kodim08.png"]), {}, options)


def test_no_photograph_has_two_roles(tmp_path: Path) -> None:
    (tmp_path / "kodak").mkdir()
    for place in range(24):
        color = torch.full((3, 32, 48), place, dtype=torch.uint8)
        to_pil_image(color).save(tmp_path / "kodak" / f"kodim{place + 1:02d}.png")
    found = Photographs.load(str(tmp_path))
    parts = [[int(photograph.max()) for photograph in part] for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [15, 3, 6]
    assert {place for part in parts for place in part} == set(range(24))
    assert found.test_names == [f"kodim{place + 1:02d}.png" for place in parts[2]]
    assert super_resolution.SHOWN.keys() <= set(found.test_names)


def test_losses_are_those_of_the_paper() -> None:
    plain, extended = (Setting(loss, 1.0, 0.7).criterion({}, 3) for loss in ("MMD", "MMD++"))
    assert isinstance(plain, PatchMMDLoss)
    assert isinstance(extended, PatchMMDLoss)
    assert (plain.bandwidth, plain.remove_mean, plain.local_weight) == (0.7, False, 0)
    assert (extended.bandwidth, extended.remove_mean, extended.local_weight) == (0.7, True, 0.025)
    random = Setting("random VGG").criterion({}, 3)
    assert isinstance(random, VGGLoss)
    assert random.mode == "redrawn"
    assert random.normalize
    assert Setting("L2").criterion({}, 3) is None
    assert len({str(Setting(*some)) for some in (("MMD",), ("MMD", 2.0), ("MMD", 1.0, 0.5), ("MMD++",), ("L2",))}) == 5


def test_copies_differ_by_the_loss_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    draw = RandomCrops.__getitem__

    def watched(crops: RandomCrops, index: int) -> tuple[Tensor, Tensor]:
        pair = draw(crops, index)
        if index == 0:
            seen.append([])
        seen[-1].append(pair[1])
        return pair

    monkeypatch.setattr(RandomCrops, "__getitem__", watched)
    runs = _runs(tmp_path)
    before = torch.get_rng_state()
    first, second = (runs.network(setting, 2, seed=5) for setting in (Setting("L2"), Setting("MMD++", 1.0, 0.7)))
    assert torch.equal(torch.get_rng_state(), before)
    start, *tuned = (torch.stack(crops) for crops in seen)
    assert torch.equal(*tuned)
    assert not torch.equal(start, tuned[0])
    assert _differ(first, second) > 0
    assert _differ(first, runs.network(Setting("L2"), 2, seed=5)) == 0, "kept in a file"
    assert len(seen) == 3


def test_settings_are_chosen_by_the_distance_on_validation_photographs() -> None:
    asked = []

    class FakeRuns:
        def bicubic(self, part: str) -> list[dict[str, float]]:
            return [{"swd": 9.0}]

        def of(self, setting: Setting, part: str, steps: int, seeds: list[int]) -> list[dict[str, float]]:
            asked.append((part, steps, tuple(seeds)))
            return [{"swd": abs(setting.pixel_weight - 3) + abs(setting.bandwidth - 0.7), "psnr": 0.0} for _ in seeds]

    grid = {"L2": ((1.0, 0.0),), "MMD": ((1.0, 0.7), (3.0, 0.7), (10.0, 0.7), (3.0, 0.5))}
    chosen, tried = super_resolution.choose(FakeRuns(), grid, 7, [1000, 1001])
    assert chosen == {"L2": Setting("L2"), "MMD": Setting("MMD", 3.0, 0.7)}
    assert set(asked) == {("validation", 7, (1000, 1001))}
    assert len(tried) == 1 + 1 + 4


def test_tiles_hold_every_pixel_once() -> None:
    image = torch.arange(512 * 768.0).view(1, 512, 768).expand(3, 512, 768)
    cut = tiles(image)
    assert cut.shape == (6, 3, 256, 256)
    assert torch.equal(cut[:, 0].flatten().sort().values, image[0].flatten())
    assert torch.equal(cut[1], image[:, :256, 256:512])


def test_what_is_closer_is_judged_better() -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 32, 32), size=(256, 256), mode="bicubic").clamp(0, 1)
    photographs = [(255 * smooth[0]).to(torch.uint8)]

    class Blocks(nn.Module):
        def forward(self, low: Tensor) -> Tensor:
            return nn.functional.interpolate(nn.functional.avg_pool2d(low, 4), scale_factor=16.0)

    good, bad = (judge(network, photographs, 64) for network in (Bicubic(), Blocks()))
    assert good["psnr"] > bad["psnr"]
    assert good["ssim"] > bad["ssim"]
    assert good["swd"] < bad["swd"]


def test_missing_data_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `data_dir` to be a directory with kodak/kodim01\.png"):
        super_resolution.main(["--quick", "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_quick_run_prints_its_figures_and_repeats_no_run(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {loss: super_resolution.GRID[loss] for loss in ("L2", "VGG", "MMD++")}
    monkeypatch.setattr(super_resolution, "GRID", few)
    arguments = [*SMALL, "--data-dir", str(data_dir), "--out", str(tmp_path)]
    figures = super_resolution.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    losses = {"bicubic", *few}
    for name in ("psnr", "ssim", "swd"):
        assert figures[name].keys() == losses
    assert 20 < figures["psnr"]["bicubic"] < 30
    assert all(value > 0 for value in figures["swd"].values())
    assert {path.name for path in tmp_path.iterdir()} == {"super_resolution.png", "runs.csv", "networks"}
    log = (tmp_path / "runs.csv").read_text()
    assert super_resolution.main(arguments) == figures
    assert (tmp_path / "runs.csv").read_text() == log
