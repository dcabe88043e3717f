from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import soft_counts


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_quick_run_prints_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fresh process for each method takes seconds to start; one is started in the test below.
    monkeypatch.setattr(soft_counts, "peak_megabytes", lambda method, images, options: float(images))
    small = ["--quick", "--images", "6", "--chunk-size", "4", "--rounds", "1", "--threads", "1", "--data-dir", str(tmp_path)]
    figures = soft_counts.main(small)
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last == figures
    assert "random images" in out
    for key in ("ratio_plain", "speedup_vmap_stored", "speedup_vmap_two_pass", "peak_growth"):
        assert last[key] > 0
    assert last["peak_growth"] == 2.0
    assert last["num_parameters"] == 317_069
    assert last["disagreement"] <= 1e-4


def test_counts_are_sums_of_cosines_of_gradients() -> None:
    problem = soft_counts.Problem(soft_counts.load_images("nowhere", 5)[0], chunk_size=2)
    rows = []
    for image in problem.images:
        value = (problem.network(image.float()[None, None] / 255) @ problem.direction).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(problem.network.parameters()))]).double())
    unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    expected = (unit @ unit.T).sum(1)
    for count in (problem.ours, problem.vmap_two_pass, problem.vmap_stored):
        torch.testing.assert_close(count().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_wrong_count_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = soft_counts.Problem(soft_counts.load_images("nowhere", 4)[0], chunk_size=2)
    right = problem.vmap_stored()
    monkeypatch.setattr(problem, "vmap_stored", lambda: right * 1.01)
    with pytest.raises(RuntimeError, match=r"disagree by 9\.9e-03"):
        soft_counts.disagreement(problem)


def test_memory_is_measured_in_a_fresh_process() -> None:
    options = soft_counts.read_arguments(["--quick", "--data-dir", "nowhere", "--threads", "1", "--chunk-size", "8"])
    stored = 64 * 317_069 * 4 / 1e6
    assert soft_counts.peak_megabytes("vmap_stored", 64, options) > 0.9 * stored
