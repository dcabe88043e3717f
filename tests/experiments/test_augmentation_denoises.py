from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import augmentation_denoises
from experiments.augmentation_denoises import COPIES, SETTINGS, Copies, exact_law, moments, run, shared_factor, slope, turned
from experiments.noisy_targets import Kernel, seeded, train_together, training


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    """In place of MNIST: bars of several lengths and random brightness in the middle."""
    images = torch.zeros(1000, 1, 28, 28)
    for place, image in enumerate(images):
        length = 3 + place % 6
        image[0, 14 - length : 14 + length, 11:17] = 0.2 + 0.8 * torch.rand(2 * length, 6)
    return images, torch.arange(1000) % 10


def test_moving_and_turning_changes_no_value_to_be_learned(digits: tuple[Tensor, Tensor]) -> None:
    images = torch.nn.functional.avg_pool2d(digits[0][:50], 3, stride=1, padding=1)
    before = moments(images)
    after = moments(turned(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(before, after)
    assert ((before - after).square().mean(0).sqrt() < 0.1 * before.std(0)).all()


def test_elongation_is_that_of_the_axes() -> None:
    bar = torch.zeros(1, 1, 28, 28)
    bar[0, 0, 4:24, 12:17] = 0.5
    ink, ratio = moments(bar)[0]
    assert float(ink) == pytest.approx(50)
    assert float(ratio) == pytest.approx(0.5 * math.log((20**2 - 1) / (5**2 - 1)))
    torch.testing.assert_close(moments(bar.rot90(1, (2, 3))), moments(bar))


@pytest.mark.parametrize("setting", SETTINGS)
def test_copies_share_the_truth_and_if_so_told_the_noise(setting: tuple[str, str], digits: tuple[Tensor, Tensor]) -> None:
    data = Copies.make(*setting, digits, 30, 4, seed=2)
    groups = (data.inputs.unflatten(0, (30, 4)), data.truth.unflatten(0, (30, 4)))
    same_truth = bool((groups[1] == groups[1][:, :1]).all())
    same_image = bool((groups[0] == groups[0][:, :1]).all())
    assert same_truth == (setting[1] != "different")
    assert same_image == (setting[1] == "identical")
    for noise, (labels, twin) in data.labels.items():
        if setting[0] == "values":
            assert torch.equal(twin, data.truth)
            added = (labels - data.truth).unflatten(0, (30, 4))
            assert bool((added - added[:, :1]).abs().max() < 1e-5) == (noise == "shared")
        else:
            for some in (labels, twin):
                changed = ((some - data.truth) % 10).unflatten(0, (30, 4))
                assert bool((changed == changed[:, :1]).all()) == (noise == "shared")
                assert 0.2 < float((changed != 0).float().mean()) < 0.6
            assert not torch.equal(labels, twin)


def test_noise_of_values_is_as_large_as_their_spread(digits: tuple[Tensor, Tensor]) -> None:
    data = Copies.make("values", "identical", digits, 400, 2, seed=2)
    assert data.truth.std(0).tolist() == pytest.approx([1, 1], rel=0.1)
    labels, truth = data.labels["independent"]
    assert float((labels - truth).std()) == pytest.approx(1, rel=0.1)


def test_networks_trained_together_are_those_trained_alone() -> None:
    inputs, targets = torch.rand(3, 60, 1, 14, 14), torch.randn(3, 60, 2)
    together, alone = ([seeded(seed, 1, 14, 2) for seed in range(3)] for _ in range(2))
    train_together(together, inputs, targets, 4, [5, 6, 7])
    for place in range(3):
        train_together(alone[place : place + 1], inputs[place : place + 1], targets[place : place + 1], 4, [5 + place])
    for one, other in zip(together, alone, strict=True):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
    assert not torch.equal(next(together[0].parameters()), next(seeded(0, 1, 14, 2).parameters()))


def test_training_halts_at_its_marks_and_fits() -> None:
    network, inputs = seeded(0, 1, 14, 10), torch.rand(20, 1, 14, 14)
    classes = torch.arange(20) % 10
    losses = [
        float(torch.nn.functional.cross_entropy(network(inputs).detach(), classes))
        for _ in training(network, inputs, classes, [1, 200], seed=0)
    ]
    assert len(losses) == 2
    assert losses[1] < 0.2 * losses[0]


def test_the_factor_of_shared_noise_is_that_of_one_copy_each(digits: tuple[Tensor, Tensor]) -> None:
    images, network = torch.nn.functional.avg_pool2d(digits[0][:12], 2), seeded(1, 1, 14, 2)
    zeros, queries = torch.zeros(12, 2), torch.arange(4)
    alone = Kernel(network, images).average(zeros, zeros, queries).factor
    copied = Kernel(network, images.repeat_interleave(3, 0))
    torch.testing.assert_close(shared_factor(copied, 3 * queries, 3).float(), alone, atol=1e-4, rtol=1e-3)
    factor = copied.average(zeros.repeat(3, 1), zeros.repeat(3, 1), 3 * queries).factor
    torch.testing.assert_close(shared_factor(copied, 3 * queries, 1).float(), factor, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(factor * math.sqrt(3), alone, atol=1e-4, rtol=1e-3)


def test_the_law_is_exact_where_copies_are_seen_as_identical(digits: tuple[Tensor, Tensor]) -> None:
    found = exact_law(digits, seed=0, number=6, steps=5)
    assert max(found.values()) < 1e-10


def test_slope() -> None:
    assert slope(COPIES, [3 / math.sqrt(copies) for copies in COPIES]) == pytest.approx(-0.5)


def test_one_copy_shares_its_noise_with_itself(digits: tuple[Tensor, Tensor]) -> None:
    found = run(("values", "moved"), digits, 10, 1, [2, 3], [7, 8])
    assert {name.split(" ")[0] for name in found} == {"7", "8"}
    assert found["7 shared_noise_3"] == found["7 independent_noise_3"] != found["8 independent_noise_3"]
    assert "7 independent_factor_3" in found
    assert "7 independent_factor_2" not in found


def test_missing_data_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `data_dir` to be a directory with MNIST/raw in it"):
        augmentation_denoises.main(["--quick", "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_quick_run_prints_its_figures_and_repeats_no_run(
    digits: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augmentation_denoises, "load_digits", lambda data_dir: digits)
    monkeypatch.setattr(augmentation_denoises, "COPIES", (1, 2))
    monkeypatch.setattr(augmentation_denoises, "exact_law", partial(exact_law, number=4, steps=2))
    arguments = ["--quick", "--digits", "6", "--lengths", "2", "4", "--data-dir", "", "--out", str(tmp_path)]
    figures = augmentation_denoises.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["settings"].keys() == {", ".join(setting) for setting in SETTINGS}
    for setting, summary in figures["settings"].items():
        assert ("shared_noise_4" in summary["means"]) == ("different" not in setting)
        assert summary["means"]["independent_noise_4"].keys() == {"1", "2"}
    assert max(figures["exact"].values()) < 1e-10
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"augmentation_denoises.png", *(f"{task} {kind}, 2-4 steps, seeds 100.csv" for task, kind in SETTINGS)}
    log = (tmp_path / "values moved, 2-4 steps, seeds 100.csv").read_text()
    assert augmentation_denoises.main(arguments) == figures
    assert (tmp_path / "values moved, 2-4 steps, seeds 100.csv").read_text() == log
