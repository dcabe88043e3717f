from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import write_results
from benchmarks.write_results import BY_HAND, SCRIPTS

DIGITS, PHOTOS = "MNIST test images, weights after 300 training steps", "CIFAR-10 test images, trained weights"
RIGHT = {"correct": True, "error": 1e-6, "seconds": 0.5, "in_units_of_ours": 2.5}
WRONG = {"correct": False, "reason": "wrong: off by 1.0e-02"}
SECONDS = {"plain": 1.0, "ours": 2.5}
FIGURES: dict[str, dict[str, Any]] = {
    "soft_counts": {
        "ratio_plain": 2.5,
        "ratio_plain_resnet20": 2.9,
        "ratio_plain_range": [2.4, 2.6],
        "ratio_plain_fastest_chunk": 2.7,
        "fastest_plain_chunk": 128,
        "speedup_vmap_stored": 1.5,
        "peak_megabytes": {"plain": [57.0], "ours": [100.0, 105.0]},
        "median_seconds": {"mnist": SECONDS, "mnist_stored": SECONDS | {"plain_128": 0.9}, "resnet20": SECONDS},
        "disagreement": {"mnist": 1e-5, "resnet20": 1e-6},
        "images": {"mnist": DIGITS, "resnet20": PHOTOS},
        "num_images": {"mnist": 10_000, "mnist_stored": 2048, "resnet20": 1000},
        "chunk_size": 64,
        "rounds": 5,
    },
    "peers": {
        "speedup_dattri": 31.0,
        "peers": {"mnist": {"ours": RIGHT, "loop": RIGHT}, "resnet20": {"captum": WRONG}, "matrix": {"dattri": RIGHT}},
        "num_images": {"mnist": 512, "resnet20": 128, "matrix": 500},
        "chunk_size": 64,
        "rounds": 5,
    },
    "sketch": {
        "speedup_trak": 90.0,
        "rms_error": {"trak": 0.024, "ours": 0.016},
        "median_seconds": {"trak": 9.0, "ours": 0.1, "ours_with_jacobian": 0.15},
        "num_images": 64,
        "images": DIGITS,
        "num_parameters": 317_069,
    },
    "neighbors": {
        "ratio_plain": 4.9,
        "recalls": {"mnist_1_store": {"images": 2000, "recall": 1.0, "said": 1.0, "largest_error": 1e-6, "seconds": 4.0}},
        "median_seconds": {
            "mnist": {"plain": 1.0, "neighbors": 4.9},
            "all_outputs": {"chosen_plan": 1, "sketch_all_outputs": 4},
        },
        "plan": "sketch",
        "num_images": {"mnist": 10_000, "all_outputs": 1000, "queries": 64},
    },
    "similarity_cost": {
        "exact_ratio": 4.5,
        "minibatch_ratio": 4.2,
        "median_seconds": {"plain": 0.02, "exact": 0.09, "minibatch": 0.084},
        "disagreement": 1e-12,
        "images": 64,
        "num_parameters": 317_069,
        "rounds": 21,
    },
    "ctv": {
        "speedup_pairwise": 120.0,
        "regularizer_ratio": 1.2,
        "speedups": {"pairs": {"l1": 120.0}, "pdist": {"l1": 5.0}, "broadcast": {"l1": 110.0}},
        "median_seconds": {"l1": {"ours": 0.05, "pairs": 6.0, "pdist": 0.25}},
        "median_seconds_half": {"l1": {"ours": 0.02, "broadcast": 2.2}},
        "disagreement": 1e-15,
        "num_differences": {"all": 4096, "half": 2048, "many": 16_384},
        "coordinates": 128,
        "seconds_many": {"l1": 0.3},
        "peak_megabytes_many": {"l1": 34.0},
        "pair_megabytes_many": 68_715,
        "machine_megabytes": 25_000,
        "median_seconds_step": {"n_pair": {"plain": 0.1, "chain": 0.12, "all_pairs": 0.13, "vectors": 0.13}},
        "regularizer_ratios": {"n_pair": {"chain": 1.2, "all_pairs": 1.3, "vectors": 1.3}},
        "images": 256,
        "steps": 31,
        "rounds": 3,
    },
    "patch_mmd": {
        "speedup_vgg19": 2.5,
        "peak_mb": 50.0,
        "rff_error": 0.004,
        "ratio_geomloss": 1.1,
        "disagreement_geomloss": 1e-15,
        "errors": {"ours, two images": 0.004, "autograd, smoothed": 0.02},
        "spreads": {"ours, two images": 0.08, "autograd, smoothed": 0.06},
        "median_seconds": {"ours_512": 0.2, "autograd_512": 1.0, "vgg19": 0.5},
        "peak_megabytes": {"ours_512": 50.0, "autograd_512": 400.0, "vgg19": 300.0},
        "median_seconds_sets": {"2048": {"ours": 0.055, "geomloss": 0.05}},
        "ratios_geomloss": {"2048": 1.1},
        "coordinates": 64,
        "images": 5,
        "side": 128,
        "features": 512,
        "draws": 60,
        "rounds": 11,
    },
    "scaling": {
        "growth_counts": 4.0,
        "series": {"N": [{"value": 1, "N": 2500, "counts_seconds": 1.5}, {"value": 2, "N": 5000, "counts_megabytes": 90.0}]},
    },
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file to write, beside figures of all scripts from an earlier run."""
    folder = tmp_path / "kept"
    folder.mkdir()
    for name, figures in FIGURES.items():
        (folder / f"{name}.json").write_text(json.dumps(figures | {"seconds": 120}), encoding="utf-8")
    monkeypatch.setattr(write_results, "KEPT", folder)
    return tmp_path / "RESULTS.md"


def test_page_has_every_bound_and_what_became_of_it(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_results, "run", lambda name, options: write_results.kept(name))
    assert write_results.main(["--only", "sketch", "--out", str(kept)]) == 0
    text = kept.read_text(encoding="utf-8")
    rows = {}
    for line in text.split("\n## ")[1].splitlines()[4:]:
        _, _, figure, *cells, _ = (cell.strip() for cell in line.split("|"))
        rows[figure] = cells
    assert rows["`soft_counts.py`: `ratio_plain`"] == ["≤ 3", "2.3", "2.5", "held, aim missed"]
    assert rows["`soft_counts.py`: `ratio_plain_resnet20`"] == ["≤ 2.7", "2.1", "2.9", "**missed**"]
    assert rows["`soft_counts.py`: `peak_growth`"][-2:] == ["-", "not measured"]
    assert rows["`peers.py`: `speedup_dattri`"] == ["≥ 10", "30", "31", "held, aim too"]
    assert rows["`neighbors.py`: `ratio_plain`"][-1] == "held, aim too"
    assert rows["`scaling.py`: `growth_counts`"][-1] == "held"
    assert len(rows) == sum(len(module.BOUNDS) for module in SCRIPTS.values())
    assert rows["`ctv.py`: `speedup_pairwise`"] == ["≥ 30", "-", "120", "held"]
    assert rows["`ctv.py`: `regularizer_ratio`"] == ["≤ 1.15", "-", "1.2", "**missed**"]
    assert rows["`patch_mmd.py`: `speedup_vgg19`"] == ["≥ 1.5", "3", "2.5", "held, aim missed"]
    assert rows["`patch_mmd.py`: `ratio_geomloss`"] == ["≤ 1", "-", "1.1", "**missed**"]
    assert "took 16 minutes" in text
    assert "- `captum`, counts, ResNet-20, 128 images: wrong: off by 1.0e-02" in text
    assert "| `loop` | 2.5 (0.5 s) | - | - |" in text
    assert "| 5,000 | - | 90 |" in text
    assert "| `m[first] - m[second]` of all pairs, `l1` | 4,096 | 6,000 | 120 |" in text
    assert "| `ctv_norm`, `l1` | 2,048 | 20 | 1 |" in text
    assert "| none | 100 |" in text
    assert "| `DifferenceAlignmentLoss()`, along a chain | 120 (1.2) |" in text
    assert "| `VGGLoss`, VGG-19 up to conv5_3 | 500 | 2.5 | 300 |" in text
    assert "| ours, two images | 0.004 | 0.08 |" in text
    assert "| 2,048 and 2,048 | 55 | 50 | 1.1 |" in text


def test_a_peer_that_is_not_installed_is_left_out(kept: Path) -> None:
    without = {"median_seconds_sets": {}, "ratios_geomloss": {}, "ratio_geomloss": None, "disagreement_geomloss": None}
    text = "\n".join(write_results.patch_mmd_section(FIGURES["patch_mmd"] | without))
    assert "| ours, two images |" in text
    assert "geomloss" not in text


def test_what_is_written_by_hand_stays(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_results, "run", lambda name, options: write_results.kept(name))
    kept.write_text(f"from before\n\n{BY_HAND}\n\n## By hand\n", encoding="utf-8")
    write_results.main(["--out", str(kept)])
    assert kept.read_text(encoding="utf-8").endswith(f"{BY_HAND}\n\n## By hand\n")
    assert "from before" not in kept.read_text(encoding="utf-8")


def test_a_script_that_fails_leaves_the_figures_of_the_others(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_results, "run", lambda name, options: None if name == "peers" else write_results.kept(name))
    assert write_results.main(["--out", str(kept)]) == 1
    text = kept.read_text(encoding="utf-8")
    assert "(`peers.py`)\n\nNot measured." in text
    assert "(`sketch.py`)\n\n64 MNIST" in text


def test_a_script_is_run_and_its_last_line_kept(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_results, "HERE", kept.parent)
    options = write_results.read_arguments(["--quick"])
    (kept.parent / "sketch.py").write_text(
        "import sys\nprint(sys.argv[1:])\nprint('{\"speedup_trak\": 5}')\n", encoding="utf-8"
    )
    figures = write_results.run("sketch", options)
    assert figures is not None
    assert figures["speedup_trak"] == 5
    assert write_results.kept("sketch") == figures
    assert "'--quick'" in capsys.readouterr().out
    (kept.parent / "sketch.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    assert write_results.run("sketch", options) is None


def test_quick_runs_do_not_touch_the_results(kept: Path) -> None:
    assert write_results.read_arguments(["--quick"]).out == write_results.KEPT / "RESULTS.md"
    assert write_results.read_arguments([]).out == Path(write_results.__file__).parent / "RESULTS.md"


def test_every_bound_is_described() -> None:
    for name, module in SCRIPTS.items():
        for key in module.BOUNDS:
            assert key in write_results.WHAT or (name, key) in write_results.WHAT_BY_SCRIPT
