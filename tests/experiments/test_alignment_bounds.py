from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import alignment_bounds
from experiments.alignment_bounds import LOSSES, Setting, measure, run, spearman, spread
from experiments.run_log import RunLog
from lightning_netsim.losses import ContrastiveLoss

Labeled = tuple[Tensor, Tensor]


def _images(count: int, seed: int) -> Labeled:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_bounds, "load", lambda seed: (_images(80, seed), _images(70, seed + 100)))
    monkeypatch.setattr(alignment_bounds, "LOSS_BATCHES", 3)


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
    train, held_out = _images(80, 0), _images(70, 1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    large = measure(network, ContrastiveLoss(), False, train, held_out)
    with torch.no_grad():
        network[1].weight.mul_(1e-3)
        network[1].bias.mul_(1e-3)
    shrunk = measure(network, ContrastiveLoss(), False, train, held_out)
    assert shrunk["max_distance"] == pytest.approx(1e-3 * large["max_distance"], rel=1e-4)
    for part in ("spread_train", "spread_test"):
        assert shrunk[part] == pytest.approx(large[part], rel=1e-4)
    assert large["gap"] == large["loss_test"] - large["loss_train"]


def test_both_parts_have_the_same_classes_and_no_image_in_common() -> None:
    train, held_out = alignment_bounds.load(3)
    assert set(train[1].tolist()) == set(held_out[1].tolist()) == set(range(10))
    assert len(train[1]) + len(held_out[1]) == 1797
    assert not torch.equal(train[0][:100], alignment_bounds.load(4)[0][0][:100])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_is_the_same_each_time_and_alignment_changes_it(loss: str, small: None) -> None:
    before = torch.get_rng_state()
    plain, again, aligned, short = (
        run(setting, 5, 4) for setting in (Setting(loss), Setting(loss), Setting(loss, 3.0), Setting(loss, 3.0, length=2))
    )
    assert torch.equal(torch.get_rng_state(), before)
    for found in (plain, again, aligned, short):
        del found["seconds"]
    assert plain == again
    assert aligned != plain
    assert short != aligned
    assert run(Setting(loss), 6, 4)["loss_train"] != plain["loss_train"]


def test_a_sum_weighs_as_many_pairs_as_the_chain_has() -> None:
    assert Setting("N-pair", 2.0, length=4).factor() == 2.0
    assert Setting("N-pair", 2.0, length=4, total=True).factor() == 2.0 * 6
    assert Setting("N-pair", 2.0, total=True).factor() == 2.0 * 63 * 62 / 2
    assert str(Setting("N-pair", 2.0, length=4, total=True)) == "N-pair + 2 distance squared_l2 n=4 sum"
    assert str(Setting("N-pair", 0.0, norm="l2")) == "N-pair", "without alignment its kind makes no difference"


def test_rank_correlation() -> None:
    assert spearman([0.0, 0.1, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([0.0, 0.1, 5.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert spearman([0.0, 0.1, 5.0], [1.0, 1.0, 1.0]) == 0, "no rank among equals"


def test_changes_are_paired_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_bounds, "run", lambda setting, seed, steps: {"gap": seed + 0.5 * setting.weight})
    settings = {weight: Setting("N-pair", weight) for weight in (0.0, 1.0, 2.0)}
    found = alignment_bounds.follow(RunLog(tmp_path / "runs.csv"), settings, 1, range(2))
    assert found["gap"] == [0.5, 1.0, 1.5]
    assert found["gap_se"] == [0.5, 0.5, 0.5]
    assert found["gap_change"] == [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]]
    assert found["gap_rho"] == 1
    assert found["gap_rho_by_seed"] == [1, 0]


def test_a_run_that_stands_in_the_log_is_not_repeated(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"gap": 1 / 3}

    key = {"setting": "N-pair + 1, n=2", "seed": 0}
    first = RunLog(tmp_path / "runs.csv").get(key, make)
    second = RunLog(tmp_path / "runs.csv").get(key, make)
    assert first == second == {"gap": 0.333333}
    assert len(made) == 1
    RunLog(tmp_path / "runs.csv").get(key | {"seed": 1}, make)
    assert len(made) == 2


def test_quick_run_prints_its_figures_and_repeats_no_run(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--steps", "2", "--out", str(tmp_path)]
    figures = alignment_bounds.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(figures))
    assert len(figures["spread_train"]) == len(figures["spread_test"]) == len(figures["weights"]) == 3
    assert min(figures["spread_train"]) > 0
    for key in ("spread_rho", "gap_lambda_rho", "gap_chain_rho"):
        assert figures[key].keys() == {"N-pair", "contrastive"}
        assert all(-1 <= value <= 1 for value in figures[key].values())
    assert {path.name for path in tmp_path.iterdir()} == {"alignment_bounds.png", "runs.csv"}
    log = (tmp_path / "runs.csv").read_text()
    assert alignment_bounds.main(arguments) == figures
    assert (tmp_path / "runs.csv").read_text() == log
