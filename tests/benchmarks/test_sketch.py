from __future__ import annotations

import json

import pytest
import torch

from benchmarks import sketch
from tests.benchmarks.conftest import NOWHERE


def test_quick_run_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trak", reason="needs `pip install -e .[bench]`")
    small = ["--images", "4", "--width", "100", "--rounds", "1", "--threads", "1", "--data-dir", NOWHERE]
    figures = sketch.main(["--quick", *small])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["speedup_trak"] > 0
    assert figures["speedup_trak_with_jacobian"] > 0
    assert all(0 < error < 0.2 for error in figures["rms_error"].values())


def test_error_of_a_sketch_is_that_of_its_inner_products() -> None:
    gradients = torch.nn.functional.normalize(torch.randn(6, 500), dim=1)
    signs = torch.randint(0, 2, (500, 100)) * 2.0 - 1
    assert 0.02 < sketch.sketch_error(gradients @ signs / 10, gradients, width=100) < 0.2
    assert sketch.sketch_error(gradients, gradients, width=100) == 0
    with pytest.raises(RuntimeError, match="are off by"):
        sketch.sketch_error(gradients @ signs, gradients, width=100)
