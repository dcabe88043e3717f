from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import noisy_rounds
from experiments.noisy_rounds import (
    NOISE,
    UPDATES,
    WRONG,
    Problem,
    Round,
    distances,
    error,
    gains,
    moved,
    observation,
    rank_correlation,
)


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    """In place of MNIST: squares of several sizes and random brightness, away from the edges."""
    images = torch.zeros(3000, 1, 28, 28)
    for place, image in enumerate(images):
        side = 4 + place % 8
        image[0, 8 : 8 + side, 8 : 8 + side] = torch.rand(side, side)
    return images, torch.arange(3000) % 10


def test_the_true_displacement_moves_the_outline_back(digits: tuple[Tensor, Tensor]) -> None:
    problem = Problem.make("displacement", digits, 50, seed=3)
    picture, outline = problem.inputs[:, :1], problem.inputs[:, 1:]
    expected = torch.nn.functional.max_pool2d(picture, 3, stride=1, padding=1) - picture
    assert torch.equal(moved(outline, problem.truth.long()), expected)
    assert problem.truth.abs().max() == noisy_rounds.REACH
    assert len(problem.truth.unique(dim=0)) > 20


def test_noise_has_the_size_that_is_said_and_depends_on_the_seed(digits: tuple[Tensor, Tensor]) -> None:
    displaced, classes = (Problem.make(task, digits, 1500, seed=3) for task in noisy_rounds.TASKS)
    assert error(displaced.labels, displaced.truth) == pytest.approx(NOISE, rel=0.05)
    assert error(classes.labels, classes.truth) == pytest.approx(WRONG, abs=0.03)
    assert not torch.equal(displaced.labels, Problem.make("displacement", digits, 1500, seed=4).labels)
    assert torch.equal(displaced.labels, Problem.make("displacement", digits, 1500, seed=3).labels)


def test_errors() -> None:
    values, truth = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert distances(values, truth).tolist() == pytest.approx([12.5**0.5, 0])
    assert error(values, truth) == pytest.approx(2.5)
    assert error(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 4, 3])) == 0.25


@pytest.mark.parametrize("task", noisy_rounds.TASKS)
def test_labels_are_replaced_by_what_the_update_says(task: str, digits: tuple[Tensor, Tensor]) -> None:
    problem = Problem.make(task, digits, 40, seed=0)
    now = Round(problem, problem, problem.labels, epochs=1, seed=0)
    whole = now.kernel.jacobian.materialize().double()
    size = problem.outputs
    pairs = torch.einsum("iap,jbp->ijab", whole, whole)
    weights = torch.linalg.solve(pairs.sum(1).unsqueeze(1), pairs)
    rows = problem.labels.double() if task == "displacement" else torch.eye(size)[problem.labels].double()
    averaged = torch.einsum("ijab,jb->ia", weights, rows)
    torch.testing.assert_close(now.average.smoothed_targets.double(), averaged, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        now.average.factor.double(), (weights.square().sum((1, 2, 3)) / size).sqrt(), rtol=0.5, atol=0, msg="by 32 probes"
    )
    near = now.kernel.nearest(5)
    assert (near == torch.arange(40).unsqueeze(1)).any(1).all(), "a sample is its own neighbor"
    kept, output = (now.relabel(update) for update in ("kept", "output"))
    assert torch.equal(kept, problem.labels)
    assert torch.equal(output, now.outputs if task == "displacement" else now.outputs.argmax(1))
    for update in UPDATES:
        assert now.relabel(update).shape == problem.labels.shape
        assert now.relabel(update).dtype == problem.labels.dtype


def test_neighbors_are_counted_by_the_normalized_kernel(digits: tuple[Tensor, Tensor]) -> None:
    problem = Problem.make("displacement", digits, 30, seed=0)
    now = Round(problem, problem, problem.labels, epochs=1, seed=0)
    similarity = now.kernel.features.inner(now.kernel.features)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(30))
    torch.testing.assert_close(now.neighbors, similarity.mean(1))


def _row(errors: list[float], neighbors: list[float]) -> dict[str, float]:
    row = {"error_0": errors[0]}
    for number in range(1, 4):
        row |= {f"output_error_{number}": errors[number], f"output_network_{number}": errors[number]}
        row[f"output_neighbors_{number}"] = neighbors[number - 1]
    return row


def test_the_observation_is_tested_by_seed_and_over_rounds() -> None:
    agrees, differs = _row([3, 2, 0.5, 0.5], [0.3, 0.6, 0.3]), _row([3, 1, 0.5, 0.25], [0.4, 0.5, 0.6])
    assert gains(agrees, "output") == [1, 1.5, 0]
    assert gains(differs, "output") == [2, 0.5, 0.25]
    found = observation([agrees, differs], "output")
    assert (found["most_neighbors_most_gain"], found["most_neighbors_best_labels"], found["seeds"]) == (1, 2, 2)
    assert [found[f"most_neighbors_in_round_{number}"] for number in (1, 2, 3)] == [0, 1, 1]
    assert observation([agrees], "output")["neighbors_and_gain_over_rounds"] > 0
    assert observation([differs], "output")["neighbors_and_gain_over_rounds"] < 0
    assert found["gain_of_last_round"] == 0.125


def test_rank_correlation_of_a_constant_is_zero() -> None:
    rising = torch.arange(5.0)
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert rank_correlation(rising, torch.ones(5)) == 0


def test_missing_data_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `data_dir` to be a directory with MNIST/raw in it"):
        noisy_rounds.main(["--quick", "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_quick_run_prints_its_figures_and_repeats_no_run(
    digits: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noisy_rounds, "load_digits", lambda data_dir: digits)
    monkeypatch.setattr(noisy_rounds, "EPOCHS", {task: {"short": 1} for task in noisy_rounds.TASKS})
    arguments = ["--quick", "--size", "20", "--data-dir", "", "--out", str(tmp_path)]
    before = torch.get_rng_state()
    figures = noisy_rounds.main(arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["settings"].keys() == {"displacement, 1 epochs", "classes, 1 epochs"}
    for summary in figures["settings"].values():
        assert summary["observation"].keys() == set(UPDATES)
        means = summary["means"]
        assert means["kept_error_3"] == means["error_0"]
        assert len({means[f"{update}_neighbors_1"][0] for update in UPDATES}) == 1, "the first round is the same for all"
    assert {path.name for path in tmp_path.iterdir()} == {"noisy_rounds.png", "runs.csv"}
    log = (tmp_path / "runs.csv").read_text()
    assert noisy_rounds.main(arguments) == figures
    assert (tmp_path / "runs.csv").read_text() == log
