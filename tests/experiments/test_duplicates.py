from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("cleanlab", reason="the experiment compares with cleanlab")

from experiments import duplicates
from experiments.planted_issues import KINDS, Planted, Problem, activations, cleanlab_sets, judge_leaks, judge_sets


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _planted() -> Planted:
    images = torch.rand(20, 3, 16, 16, generator=_generator())
    return Planted.among(images, per_kind=2, sets=1, generator=_generator())


def test_a_shift_is_by_one_pixel() -> None:
    image = torch.arange(30.0).view(1, 5, 6)
    shifts = {tuple(KINDS["shift"](image, torch.Generator().manual_seed(seed))[0, 2, 2:4].tolist()) for seed in range(20)}
    assert shifts == {(8.0, 9.0), (13.0, 14.0), (15.0, 16.0), (20.0, 21.0)}


def test_copies_are_near_and_none_is_equal() -> None:
    image = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=_generator()), size=32, mode="bicubic")[0].clamp(0, 1)
    error = {kind: float((change(image, _generator()) - image).square().mean().sqrt()) for kind, change in KINDS.items()}
    assert 0.015 < error["noise"] < 0.021
    assert 0 < error["jpeg 90"] < error["jpeg 75"] < 0.05
    assert 0 < error["shift"] < 0.1


def test_what_is_planted_is_written_down() -> None:
    planted = _planted()
    assert len(planted.images) == len(planted.origin) == len(planted.kind) == 20 + 2 * len(KINDS) + 3
    assert (planted.origin[:20] == np.arange(20)).all()
    for kind in KINDS:
        copies = [place for place in range(20, len(planted.kind)) if planted.kind[place] == kind]
        assert len(copies) == 2
        for place in copies:
            assert planted.kind[planted.origin[place]] == kind
            assert float((planted.images[place] - planted.images[planted.origin[place]]).abs().mean()) > 0
    assert len(set(planted.origin[planted.kind == "set"].tolist())) == 1
    assert (planted.kind == "set").sum() == 4


def test_sets_as_planted_are_judged_perfect() -> None:
    planted = _planted()
    names = np.where(planted.kind != "", planted.origin, -1)
    figures = judge_sets(names, planted)
    assert figures["errors"] == 0
    assert all(figures[f"{kind} {rate}"] == 1 for kind in (*KINDS, "set", "all") for rate in ("recall", "precision"))
    assert figures["sets"] == 1


def test_twins_in_different_sets_are_not_found() -> None:
    planted = _planted()
    twin = int(np.flatnonzero(planted.kind == "noise")[-1])
    stranger = int(np.flatnonzero(planted.kind == "")[0])
    names = np.where(planted.kind != "", planted.origin, -1)
    names[twin] = names[stranger] = 99
    figures = judge_sets(names, planted)
    assert figures["noise recall"] == pytest.approx(1 / 2), "neither it nor its original, of two pairs"
    assert figures["errors"] == 3, "the copy, its original, and the stranger"
    assert figures["noise precision"] == pytest.approx(2 / 5)
    assert figures["shift recall"] == 1
    assert figures["shift precision"] == pytest.approx(4 / 7)
    whole = np.where(planted.kind == "set", 7, -1)
    whole[stranger] = 7
    assert judge_sets(whole, planted)["sets"] == 0


def test_leaks_are_judged_by_kind() -> None:
    kinds = ["", "", "", "shift", "shift", "noise", "jpeg 90", "jpeg 75"]
    figures = judge_leaks(np.array([1, 0, 0, 1, 0, 1, 0, 0]), kinds)
    assert (figures["shift recall"], figures["noise recall"], figures["jpeg 90 recall"]) == (0.5, 1, 0)
    assert (figures["shift precision"], figures["jpeg 90 precision"], figures["all recall"]) == (0.5, 0, 0.4)
    assert figures["all precision"] == pytest.approx(2 / 3)


def test_cleanlab_finds_equal_features_as_sets() -> None:
    features = np.random.default_rng(0).normal(size=(40, 8))
    features[[7, 9]] = features[3]
    names = cleanlab_sets(features)
    assert set(np.flatnonzero(names >= 0)) == {3, 7, 9}
    assert len(set(names[[3, 7, 9]])) == 1


def test_activations_are_the_input_of_the_last_linear_layer() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images = torch.randn(5, 1, 2, 2)
    assert np.allclose(activations(network, images), network[:3](images).detach().numpy())


def test_a_network_knows_the_images_that_it_learned_from_and_no_others() -> None:
    problem = Problem("digits", "", seed=0, steps=1)
    known, unseen = problem.draw(True, 50), problem.draw(False, 50)
    learned = {bytes(image.numpy().tobytes()) for image in problem.images[0]}
    assert all(image.numpy().tobytes() in learned for image in known)
    assert not any(image.numpy().tobytes() in learned for image in unseen)
    assert torch.equal(known, Problem("digits", "", seed=0, steps=1).draw(True, 50))
    assert not torch.equal(known, Problem("digits", "", seed=1, steps=1).draw(True, 50))


def test_missing_data_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `data_dir` to be a directory with cifar10/cifar10_subset\.npz in it"):
        duplicates.main(["--quick", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path)])


def test_quick_run_prints_its_figures_and_repeats_no_run(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--data", "digits", "--data-dir", str(data_dir), "--out", str(tmp_path)]
    figures = duplicates.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    found = figures["near_duplicates"]["digits"]
    assert found.keys() == {"find_issues", "kernel", "activations", "cleanlab"}
    assert found["kernel"]["noise recall"][0] == found["kernel"]["jpeg 90 recall"][0] == 1
    assert figures["leaks"]["digits"]["kernel"]["errors"][0] <= 1
    assert figures["outliers"]["digits"]["kernel"].keys() >= {"noise auroc", "flagged clean"}
    assert (tmp_path / "duplicates.png").stat().st_size > 10_000
    logs = [(tmp_path / f"{part}.csv").read_text() for part in duplicates.PARTS]
    assert duplicates.main(arguments) == figures
    assert [(tmp_path / f"{part}.csv").read_text() for part in duplicates.PARTS] == logs
