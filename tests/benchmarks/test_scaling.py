from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, neighbors, scaling
from tests.benchmarks.conftest import NOWHERE

SMALL = ["--images", "16", "--few-images", "2", "--rounds", "1", "--threads", "1", "--data-dir", NOWHERE]


def test_quick_run_prints_its_figures_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "K", 2)
    figures = scaling.main(["--quick", *SMALL, "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert scaling.BOUNDS.keys() <= figures.keys()
    assert [record["N"] for record in figures["series"]["N"]] == [4, 8, 16]
    assert [record["d"] for record in figures["series"]["d"]] == [1, 3, 10]
    assert [record["T"] for record in figures["series"]["T"]] == [196, 784, 3136]
    assert all(record["counts_seconds"] > 0 for records in figures["series"].values() for record in records)
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def options(*arguments: str) -> scaling.argparse.Namespace:
    return common.read_arguments(common.make_parser(None, scaling.SIZES), scaling.SIZES, [*SMALL, *arguments])


def test_one_quantity_grows_at_a_time() -> None:
    problems = {axis: [scaling.problem_of(axis, value, options()) for value in scaling.VALUES[axis]] for axis in ("P", "T")}
    assert [problem.num_parameters for problem in problems["P"]] == [118_349, 582_029, 4_291_469]
    assert {problem.images.shape for problem in problems["P"]} == {torch.Size([2, 1, 28, 28])}
    assert {problem.num_parameters for problem in problems["T"]} == {13_530}
    assert [problem.images.shape[-1] for problem in problems["T"]] == [14, 28, 56]
    assert [len(scaling.problem_of("N", value, options())) for value in (4, 16)] == [4, 16]


def test_memory_of_all_values_is_put_beside_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peaks(jobs: list[tuple[str, str, int]], options: object) -> list[float]:
        asked.extend(jobs)
        return [100.0 + value for _, _, value in jobs]

    monkeypatch.setattr(scaling, "peaks", peaks)
    series = {"N": [{"value": value, "N": value} for value in (4, 8, 16)], "d": [{"value": 16, "d": 16}]}
    assert scaling.weigh(series, options()) == round(132 / 116, 3)
    assert [record["counts_megabytes"] for record in series["N"]] == [104, 108, 116, 132]
    assert [record.get("neighbors_megabytes") for record in series["N"]] == [104, 108, None, None]
    assert series["d"][0]["counts_megabytes"] == 116
    assert len(asked) == len(set(asked)) == 7


@pytest.mark.parametrize(("job", "axis", "value"), [("counts", "d", 3), ("plain", "T", 14), ("neighbors", "N", 16)])
def test_memory_of_one_job_is_measured(capsys: pytest.CaptureFixture[str], job: str, axis: str, value: int) -> None:
    figures = scaling.main([*SMALL, "--measure-memory", job, axis, str(value)])
    assert json.loads(capsys.readouterr().out) == figures
    assert figures["megabytes"] >= 0
