"""Each benchmark runs, at a size that shows that it works, and its last line holds the figures of its bounds."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import neighbors, patch_mmd
from lab import Study
from tests.benchmarks.conftest import NOWHERE

SMALL = {
    "ctv": "--differences 24 --coordinates 3 --many 40 --images 20 --rounds 1 --steps 1",
    "gpu": "--images 12 --many-images 12",
    "neighbors": "--images 8 --table-images 7 --resnet-images 6 --output-images 18 --queries 4",
    "patch_mmd": "--images 1 --side 40 --features 64 --draws 6 --batch 9 --samples 20 --rounds 1",
    "peers": "--images 6 --resnet-images 4 --matrix-images 5 --rounds 1",
    "scaling": "--images 16 --few-images 2 --rounds 1",
    "similarity_cost": "--images 12 --rounds 1 --steps 0",
    "sketch": "--images 4 --width 100 --rounds 1",
    "soft_counts": "--images 6 --stored-images 5 --resnet-images 4 --rounds 1",
}
SLOW = ("gpu", "neighbors", "peers", "scaling")
NEEDS = {"sketch": "trak", "ctv": "pytorch_metric_learning"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fresh processes take seconds to start; one is started in the tests of lab.
    monkeypatch.setattr(Study, "peaks", lambda study, runs: [10.0 + place for place in range(len(runs))])
    monkeypatch.setattr(neighbors, "K", 2)
    monkeypatch.setattr(patch_mmd, "EXACT_SIDE", 36)
    network = patch_mmd.VGGLoss
    monkeypatch.setattr(patch_mmd, "VGGLoss", lambda mode: network(mode=mode, layers=["conv1_1"]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALL])
def test_quick_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs `pip install -e .[bench]`")
    script = import_module(f"benchmarks.{name}").main
    figures = script(["--quick", "--threads", "1", "--data-dir", NOWHERE, "--out", str(tmp_path), *SMALL[name].split()])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    missing = [key for key in script.bounds if figures.get(key) is None]
    assert missing == {
        "patch_mmd": ["ratio_geomloss", "disagreement_geomloss"] * (figures.get("ratio_geomloss") is None),
        "peers": ["speedup_dattri"] * ("speedup_dattri" not in figures),
        "scaling": ["growth_memory"],
    }.get(name, [])
    assert "held" not in figures
