"""Two processes average the terms of their own batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.mixins import two_processes
from tests.mixins.modules import Regularized

ROOT = Path(__file__).resolve().parents[2]


def test_the_mean_of_the_terms_of_both_processes_is_trained_on(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(two_processes.__file__)), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert found[0]["term"] != found[1]["term"]

    module = Regularized(similarity_weight=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for rank in (0, 1):
        module.training_step(found[rank]["batch"], 0).div(2).backward()
    optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found[0]["state"][name], value)
        torch.testing.assert_close(found[1]["state"][name], value)
