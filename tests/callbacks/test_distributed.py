"""Two processes that share a validation set give the tables of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_netsim import analyze
from lightning_netsim.records.record import Record
from tests.callbacks import two_processes
from tests.callbacks.small import Small, points, records

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that two processes have written to."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    path = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(two_processes.__file__))
    done = subprocess.run(
        [sys.executable, script, str(path)], env=environment, cwd=path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads((path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def alone(run: Path, size: int) -> Record:
    """Return the tables of one process, for the same weights."""
    module = Small()
    module.load_state_dict(torch.load(run / "weights.pt"))
    return analyze(module, points(size, batch_size=size), k=3, directions="all", progress=False).record


def test_tables_are_those_of_one_process_though_a_sample_was_seen_twice(run: Path) -> None:
    assert [(report["world"], report["count"]) for report in reports(run / "fit")] == [(2, 6), (2, 6)]
    first, last = records(run / "fit" / "netsim")
    expected = alone(run, two_processes.SIZE)
    assert (first.meta["epoch"], last.meta["epoch"]) == (0, 1)
    assert last.samples["index"].tolist() == list(range(11))
    assert last.samples["label"].tolist() == expected.samples["label"].tolist()
    np.testing.assert_allclose(last.samples["soft_count"], expected.samples["soft_count"], atol=1e-3)
    assert last.neighbors["neighbor"].tolist() == expected.neighbors["neighbor"].tolist()
    assert last.meta["num_reference"] == 11


def test_similarities_of_classes_are_those_of_one_process(run: Path) -> None:
    last, expected = records(run / "fit" / "netsim")[-1], alone(run, two_processes.SIZE)
    assert last.classes is not None
    assert expected.classes is not None
    for name in ("label", "other_label", "num_samples"):
        assert last.classes[name].tolist() == expected.classes[name].tolist()
    np.testing.assert_allclose(last.classes["similarity"], expected.classes["similarity"], atol=1e-5)
    assert last.classes.drop_duplicates("label")["num_samples"].sum() == two_processes.SIZE
    for name in ("same_class_similarity", "other_class_similarity"):
        np.testing.assert_allclose(last.samples[name], expected.samples[name], atol=1e-5)
    np.testing.assert_allclose(last.samples["margin"], expected.samples["margin"], atol=1e-5)


def test_scalars_are_equal_on_all_processes(run: Path) -> None:
    zero, one = (report["metrics"] for report in reports(run / "fit"))
    assert zero == one
    fraction = records(run / "fit" / "netsim")[-1].samples["neighbor_fraction"].mean()
    assert zero["netsim/neighbor_fraction"] == pytest.approx(fraction, abs=1e-6)


def test_a_limit_holds_for_each_process(run: Path) -> None:
    assert [report["count"] for report in reports(run / "limited")] == [4, 4]
    (record,) = records(run / "limited" / "netsim")
    assert record.samples["index"].tolist() == list(range(8))
    np.testing.assert_allclose(record.samples["soft_count"], alone(run, 8).samples["soft_count"], atol=1e-3)
