"""Difference alignment: bounds, unseen classes, SimCLR."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments import alignment_bounds, metric_learning, simclr
from experiments.alignment_bounds import Setting, spread
from experiments.metric_learning import DIGITS, Run, count_distances, gain
from lab import RunLog
from lightning_netsim.losses import ContrastiveLoss, MetricLearningLoss


def test_spread_is_the_mean_over_pairs_of_pairs_of_different_classes() -> None:
    points, labels = torch.rand(7, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 1, 0])
    apart = [
        float(torch.linalg.vector_norm(points[i] - points[j]))
        for i, j in itertools.combinations(range(7), 2)
        if labels[i] != labels[j]
    ]
    expected = [abs(first - second) for first, second in itertools.combinations(apart, 2)]
    assert spread(torch.cdist(points, points), labels) == pytest.approx(sum(expected) / len(expected), abs=1e-10)


def test_embeddings_that_shrink_confirm_nothing() -> None:
    train, held_out = ((torch.rand(count, 1, 8, 8), torch.arange(count) % 10) for count in (80, 70))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    large = alignment_bounds.measure(network, ContrastiveLoss(), False, train, held_out)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e-3)
    shrunk = alignment_bounds.measure(network, ContrastiveLoss(), False, train, held_out)
    assert shrunk["max_distance"] == pytest.approx(1e-3 * large["max_distance"], rel=1e-4)
    for part in ("spread_train", "spread_test"):
        assert shrunk[part] == pytest.approx(large[part], rel=1e-4)
    assert large["gap"] == large["loss_test"] - large["loss_train"]


def test_a_sum_weighs_as_many_pairs_as_the_chain_has() -> None:
    assert Setting("N-pair", 2.0, length=4).factor() == 2.0
    assert Setting("N-pair", 2.0, length=4, total=True).factor() == 2.0 * 6
    assert Setting("N-pair", 2.0, total=True).factor() == 2.0 * 63 * 62 / 2
    assert str(Setting("N-pair", 0.0, norm="l2")) == "N-pair", "without alignment its kind makes no difference"


def test_changes_are_paired_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_bounds, "run", lambda setting, seed, steps: {"gap": seed + 0.5 * setting.weight})
    study: Any = SimpleNamespace(options=SimpleNamespace(steps=1, seed=0, seeds=2), log=RunLog(tmp_path / "runs.csv"))
    found = alignment_bounds.follow(study, {weight: Setting("N-pair", weight) for weight in (0.0, 1.0, 2.0)})
    assert (found["gap"], found["gap_se"]) == ([0.5, 1.0, 1.5], [0.5, 0.5, 0.5])
    assert found["gap_change"] == [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0)]
    assert (found["gap_rho"], found["gap_rho_by_seed"]) == (1, (1, 0))


def _run(loss: str = "npair", form: str = "none", weight: float = 0.0, seed: int = 0) -> Run:
    return Run(DIGITS, loss, form, weight, 1e-3, 2, seed)


def test_sharp_control_is_the_cross_entropy_of_similarities_over_the_temperature() -> None:
    first, second = torch.randn(2, 4, 6, dtype=torch.float64)
    similarity = torch.nn.functional.cosine_similarity(first.unsqueeze(1), second, dim=2)
    wanted = torch.nn.functional.cross_entropy(similarity / 0.1, torch.arange(4))
    found = metric_learning.make_loss("npair_sharp", 4)(torch.cat([first, second]), torch.arange(4).repeat(2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_distances_are_counted_between_classes_only() -> None:
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]).view(3, 1, 1, 2)
    found = count_distances(torch.nn.Flatten(), (images, torch.tensor([0, 0, 1])))
    assert sum(found["counts"]) == 2, "the distance 0 within a class is left out"
    assert found["mean"] == pytest.approx(2**0.5, abs=1e-4)
    assert found["sd"] == 0


def test_gain_is_taken_seed_by_seed_in_points() -> None:
    alone, better = ([{"recall@1": value} for value in some] for some in ((0.5, 0.7, 0.9), (0.52, 0.70, 0.94)))
    # Differences 2, 0 and 4: a deviation of 2 over the root of 3.
    assert gain(better, alone) == {"mean": 2.0, "se": 1.15, "wins": 2}
    assert gain(better[:1], alone[:1])["se"] == 0


def _differ(left: nn.Module, right: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_the_criterion_of_simclr_is_nt_xent() -> None:
    projected, values = torch.randn(24, 8, dtype=torch.float64, requires_grad=True), []
    for name in ("NTXentLoss", "SupConLoss"):
        value = MetricLearningLoss(name, {"temperature": 0.2})(projected, torch.arange(12).repeat(2))
        values.append((value, *torch.autograd.grad(value, projected)))
    for expected, found in zip(*values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mode", "epochs", "same"), [("cluster-free", 1, False), ("cluster-used", 1, True), ("cluster-used", 2, False)]
)
def test_alignment_changes_nothing_but_the_loss_and_clusters_begin_with_the_second_epoch(
    mode: str, epochs: int, same: bool
) -> None:
    settings = (simclr.Setting(), simclr.Setting(mode, 0.0), simclr.Setting(mode, 10.0))
    images = torch.rand(64, 1, 28, 28)
    plain, without, aligned = (simclr.train(setting, images, 5, epochs, batch_size=32) for setting in settings)
    assert _differ(plain, without) == 0, "the same weights, batches and views"
    assert (_differ(plain, aligned) == 0) is same
