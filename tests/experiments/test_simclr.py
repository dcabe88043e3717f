from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments import simclr
from experiments.simclr import Data, Setting, train
from lightning_netsim.estimators import LinearProbe
from lightning_netsim.losses import MetricLearningLoss

SMALL = ["--quick", "--images", "96", "--batch-size", "32", "--epochs", "2", "--seeds", "1"]


class _NumberedImages:
    """In place of MNIST: the images of the training set show their place, those of the test set minus one minus their place."""

    def __init__(self, data_dir: str) -> None:
        pass

    def load_sets(self) -> tuple[TensorDataset, TensorDataset]:
        return tuple(
            TensorDataset(places.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), places.abs() % 10)
            for places in (torch.arange(60_000), -1 - torch.arange(10_000))
        )


def _places(images: Tensor) -> set[int]:
    return {int(place) for place in images[:, 0, 0, 0]}


def _differ(left: torch.nn.Module, right: torch.nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_no_image_has_two_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simclr, "MNISTDataModule", _NumberedImages)
    data = Data.load("", validation=2000, test=10_000)
    learned = _places(data.draw(3, 8000)[0])
    validation, test = (_places(data.judged[part][0]) for part in ("validation", "test"))
    assert [len(learned), len(validation), len(test)] == [8000, 2000, 10_000]
    assert max(learned) < simclr.POOL <= min(validation)
    assert max(test) < 0, "what is judged last are test images"
    assert learned != _places(data.draw(4, 8000)[0])


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_criterion_is_nt_xent(temperature: float) -> None:
    projected = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    instances = torch.arange(12).repeat(2)
    values = []
    for name in ("NTXentLoss", "SupConLoss"):
        value = MetricLearningLoss(name, {"temperature": temperature})(projected, instances)
        values.append((value, *torch.autograd.grad(value, projected)))
    for expected, found in zip(*values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", simclr.ALIGNED)
def test_alignment_changes_nothing_but_the_loss(mode: str) -> None:
    images = torch.rand(64, 1, 28, 28)
    before = torch.get_rng_state()
    plain, without, aligned = (
        train(setting, images, seed=5, epochs=2, batch_size=32)
        for setting in (Setting(), Setting(mode, 0.0), Setting(mode, 10.0))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert _differ(plain, without) == 0, "the same weights, batches and views"
    assert _differ(plain, aligned) > 1e-4
    assert _differ(plain, train(Setting(), images, seed=6, epochs=2, batch_size=32)) > 1e-4


def test_clusters_are_used_from_the_second_epoch_on() -> None:
    images = torch.rand(64, 1, 28, 28)
    for epochs, same in ((1, True), (2, False)):
        plain, aligned = (
            train(setting, images, seed=5, epochs=epochs, batch_size=32)
            for setting in (Setting(), Setting("cluster-used", 10.0))
        )
        assert (_differ(plain, aligned) == 0) is same


def test_settings_are_chosen_on_the_validation_split() -> None:
    asked = []

    class FakeRuns:
        def of(self, setting: Setting, part: str, seeds: list[int]) -> list[dict[str, float]]:
            asked.append((part, tuple(seeds)))
            best = {"SimCLR": 0.0, "cluster-free": 1.0, "cluster-used": 10.0}[setting.mode]
            score = 1 - abs(setting.temperature - 0.2) - abs(setting.weight - best) / 100
            return [{"knn": score, "probe": score, "nmi": 0.0} for _ in seeds]

    chosen, tried = simclr.choose(FakeRuns(), [1000, 1001], (0.1, 0.2, 0.5), (0.1, 1.0, 10.0))
    assert chosen == {
        "SimCLR": Setting(temperature=0.2),
        "cluster-free": Setting("cluster-free", 1.0, 0.2),
        "cluster-used": Setting("cluster-used", 10.0, 0.2),
    }
    assert set(asked) == {("validation", (1000, 1001))}
    assert len(tried) == 9


def test_gains_are_paired_by_seed() -> None:
    plain = [{"knn": 0.5, "probe": 0.6, "nmi": 0.1}, {"knn": 0.7, "probe": 0.6, "nmi": 0.1}]
    better = [
        row | {"knn": row["knn"] + 0.1, "probe": row["probe"] + extra} for row, extra in zip(plain, (0.0, 0.2), strict=True)
    ]
    assert simclr.gains(better, plain) == {"knn": [0.1, 0.0], "probe": [0.1, 0.1], "nmi": [0.0, 0.0]}


def test_features_that_tell_digits_apart_are_worth_more() -> None:
    labels = torch.arange(200) % 10
    told = torch.nn.functional.one_hot(labels, 10).float()
    mixed = torch.rand(200, 10)
    good, bad = (
        simclr.judge(torch.nn.Flatten(), (some[:100], labels[:100]), (some[100:], labels[100:])) for some in (told, mixed)
    )
    assert good["knn"] == good["probe"] == 1
    assert good["nmi"] > 0.9
    assert max(bad.values()) < 0.5


def test_distances_of_one_digit_and_of_two() -> None:
    points = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = simclr.distances(torch.nn.Identity(), (points, torch.tensor([0, 0, 1, 1])))
    expected = {"distance_one_digit": 2**0.5 / 2, "distance_two_digits": (2**0.5 + 2) / 2}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_missing_data_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `data_dir` to be a directory with MNIST/raw in it"):
        simclr.main(["--quick", "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_quick_run_prints_its_figures_and_repeats_no_run(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simclr, "LinearProbe", partial(LinearProbe, max_iterations=5))
    arguments = [*SMALL, "--data-dir", str(data_dir), "--out", str(tmp_path)]
    figures = simclr.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for mode in ("cluster_free", "cluster_used"):
        for judge in ("knn", "probe", "nmi"):
            assert abs(figures[f"{judge}_gain_{mode}"]) <= 1
            assert figures[f"{judge}_gain_{mode}_se"] >= 0
    assert figures["test"].keys() == {"pixels", "not trained", "SimCLR", "cluster-free", "cluster-used"}
    assert figures["test"]["pixels"]["knn"][0] > 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"simclr.png", "runs.csv", "references.csv"}
    log = (tmp_path / "runs.csv").read_text()
    assert simclr.main(arguments) == figures
    assert (tmp_path / "runs.csv").read_text() == log
