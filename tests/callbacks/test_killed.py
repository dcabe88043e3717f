"""A run that is killed leaves only whole tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_netsim import load_run
from lightning_netsim.records.record import list_records
from tests.callbacks import killed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_leaves_whole_tables(tmp_path: Path) -> None:
    # Three tables an epoch: killed at the second one of the second epoch.
    script = str(Path(killed.__file__))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "5"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (record,) = list_records(tmp_path / "netsim")
    assert record.name.startswith("epoch=0-")
    analysis = load_run(tmp_path)
    assert len(analysis.samples) == 11
    assert len(analysis.neighbors) == 33
