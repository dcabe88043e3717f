"""Every example runs, at a small size, as its reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow_but

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OPTIONS = {
    "01_analyze": ["--samples", "40", "--epochs", "1"],
    "02_monitor": ["--samples", "40", "--epochs", "1"],
    "03_similarity_loss": ["--samples", "128", "--epochs", "1"],
    "04_embeddings": ["--samples", "300", "--epochs", "1"],
    "05_distributions": ["--samples", "300", "--epochs", "1"],
    "06_clean_data": ["--samples", "300", "--epochs", "3"],
}
EXPECTED = {
    "01_analyze": "Five most isolated samples",
    "02_monitor": "scan-",
    "03_similarity_loss": "YAML:     mean similarity",
    "04_embeddings": "YAML:     recall@1",
    "05_distributions": "YAML:     after five steps",
    "06_clean_data": "after review",
}

QUICK = ("01_analyze", "03_similarity_loss")


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(OPTIONS)


@pytest.mark.parametrize("name", slow_but(QUICK, OPTIONS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *OPTIONS[name]]
    if "--out" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"):
        command += ["--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert EXPECTED[name] in finished.stdout
