"""Each study runs with small sizes: its closing line, the places of its tables, its log."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import study

slow = pytest.mark.slow
# Module, arguments beside --quick, keys of the closing line.
CASES = [
    ("toy_sinusoid", "--points 32 --epochs 2 --frequencies 1 2", "mean_count spearman loss"),
    pytest.param("alignment_bounds", "--seeds 1", "spread_train spread_rho gap_lambda_rho gap_chain_rho", marks=slow),
    pytest.param("noisy_rounds", "--size 20", "settings", marks=slow),
    pytest.param("augmentation_denoises", "--digits 6 --lengths 2 4", "settings exact", marks=slow),
    pytest.param("simclr", "--images 96 --batch-size 32 --seeds 1", "knn_gain_cluster_free nmi_gain_cluster_used", marks=slow),
    pytest.param("mnist_dynamics", "--seeds 1 --steps 10 --test-images 20", "accuracy difference weights", marks=slow),
    pytest.param("few_labels", "--steps 4 --search-steps 2", "accuracy best_on_validation tried", marks=slow),
    pytest.param("metric_learning", "--steps 2 2 --seeds 1 1 1", "npair_gain omniglot_triplet_gain_chosen rows", marks=slow),
    pytest.param("images.generalized_image_mean", "--steps 1 --sets 1", "swd gains grid setting", marks=slow),
    pytest.param("images.super_resolution", "--start-steps 2 --patches 4", "psnr ssim swd swd_floor setting", marks=slow),
    pytest.param("images.two_afc", "--draws 1 --only MMD", "agreement across spearman triplets", marks=slow),
    pytest.param("images.kernel_equivalence", "--noise --widths 16 32 --numbers 16 32", "network_slope mixture", marks=slow),
    pytest.param("label_noise", "--size 90", "auroc accuracy_after scores_tried threshold", marks=slow),
    pytest.param("duplicates", "--data digits", "near_duplicates leaks outliers", marks=slow),
]


def _without_times(figures: Any) -> Any:
    if isinstance(figures, dict):
        return {key: _without_times(value) for key, value in figures.items() if key not in ("seconds", "cost")}
    return figures


@pytest.mark.parametrize(("name", "arguments", "keys"), CASES)
def test_a_quick_run_has_its_figures_and_places_and_repeats_nothing(
    name: str,
    arguments: str,
    keys: str,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in ("label_noise", "duplicates"):
        pytest.importorskip("cleanlab", reason="the study compares with cleanlab")
    pages, out = tmp_path / "pages", tmp_path / "out"
    shutil.copytree(study.PAGES, pages)
    monkeypatch.setattr(study, "PAGES", pages)
    main = importlib.import_module(f"experiments.{name}").main
    given = [*arguments.split(), "--quick", "--write", "--data-dir", str(data_dir), "--out", str(out)]
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    figures = main([*given, "--threads", str(threads)])
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(figures))
    assert set(keys.split()) <= figures.keys()
    assert "has no place for it" not in printed, "every table has its place in the page"
    logs = {path: path.read_text() for path in out.rglob("*.csv")}
    assert logs or name == "images.kernel_equivalence", "it trains nothing"
    assert _without_times(main([*given, "--threads", str(threads)])) == _without_times(figures)
    assert {path: path.read_text() for path in out.rglob("*.csv")} == logs
