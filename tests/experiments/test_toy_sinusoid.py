from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from experiments import toy_sinusoid
from lightning_netsim.demos import sinusoid

SMALL = ["--quick", "--points", "32", "--epochs", "2", "--frequencies", "1", "2", "--threads", "1"]


def test_quick_run_prints_its_figures_and_draws_two_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = toy_sinusoid.main([*SMALL, "--out", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == figures
    for key in ("mean_count", "spearman"):
        assert list(last[key]) == ["1", "2"]
    assert all(0 < mean <= 32 for mean in last["mean_count"].values())
    assert len(last["other_mean_counts"]) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"along_circle.png", "on_circle.png", "counts.csv"}
    assert len((tmp_path / "counts.csv").read_text().splitlines()) == 1 + 2 * 32


def test_networks_trained_at_once_are_those_trained_apart() -> None:
    x, y = sinusoid(torch.arange(24) / 24, 1)
    targets = torch.stack([y, sinusoid(torch.arange(24) / 24, 2)[1]])
    together = toy_sinusoid.make_models(2, hidden_layers=2, seed=3)
    apart = copy.deepcopy(together)
    toy_sinusoid.train(together, x, targets, epochs=5, seed=7, batch_size=10)
    for run, model in enumerate(apart):
        start = copy.deepcopy(model.state_dict())
        optimizer, generator = model.configure_optimizers(), torch.Generator().manual_seed(7 + run)
        for _ in range(5):
            for batch in torch.randperm(24, generator=generator).split(10):
                optimizer.zero_grad()
                (model(x[batch]) - targets[run, batch]).abs().mean().backward()
                optimizer.step()
        for name, value in model.state_dict().items():
            moved = (value - start[name]).abs().max()
            # Adam divides by the root of the second moment: where a gradient is nearly 0, rounding decides. 1 % of the way.
            torch.testing.assert_close(together[run].state_dict()[name], value, rtol=0, atol=1e-2 * float(moved))


def test_curvature_is_that_of_the_graph() -> None:
    alpha = torch.rand(20, dtype=torch.float64).requires_grad_()
    y = torch.sin(2 * torch.pi * 3 * alpha)
    (first,) = torch.autograd.grad(y.sum(), alpha, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), alpha)
    expected = second.abs() / (1 + first.detach() ** 2) ** 1.5
    torch.testing.assert_close(toy_sinusoid.curvature(alpha.detach(), 3), expected)


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    left, right = torch.randint(0, 5, (40,)).numpy(), torch.rand(40).numpy()
    assert toy_sinusoid.spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert toy_sinusoid.spearman([1, 1, 1], [1, 2, 3]) is None


def test_a_missed_bound_is_reported() -> None:
    good = {"mean_count": {"1": 1477, "2": 1267}, "spearman": {"1": -0.95, "2": -0.7}}
    assert all(toy_sinusoid.check_bounds(good).values())
    bad = {"mean_count": {"1": 1200, "2": 1267}, "spearman": {"1": -0.85, "2": -0.7}}
    held = toy_sinusoid.check_bounds(bad)
    assert [name for name, value in held.items() if not value] == [
        "means fall with the frequency",
        "mean at f = 1 within 10 % of 1477",
        "correlation at f = 1 below -0.9",
    ]
