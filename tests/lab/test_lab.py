"""The lab: arguments, log, means, tables, pages, timing and memory of scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lab
from benchmarks import soft_counts
from lab import Bound, Mean, Size, Study, script

SIZES = {
    "steps": Size(300, 20, "steps"),
    "seeds": Size(range(3), (0, 1), "seeds"),
    "gap": Size(0.5, None, "the same in both, 5 %"),
    "choose": Size(False, None, "a switch"),
    "weights": Size(None, None, "a file", kind=str),
}

TABLE = """
| what |       value |
| ---- | ----------: |
| mean | 0.14 ± 0.08 |
""".strip()


@script(SIZES, {"low": Bound(2.0), "high": Bound(2.0, at_least=True), "unknown": Bound(1.0)}, page="study")
def main(study: Study) -> dict[str, Any]:
    runs = study.log.by_seed(
        {"steps": study.options.steps}, study.options.seeds, lambda seed: {"value": seed / 7, "all": [seed]}
    )
    study.table("means", ("what", "value"), [("mean", lab.mean_of(runs, "value"))], ("", ".2f"))
    return {"low": 1.5, "high": 1.5, "unknown": None, "options": study.sizes}


@pytest.mark.parametrize(
    ("arguments", "steps", "seeds"),
    [([], 300, [0, 1, 2]), (["--quick"], 20, [0, 1]), (["--quick", "--seeds", "5", "7"], 20, [5, 7])],
)
def test_sizes_are_full_or_quick_or_given(arguments: list[str], steps: int, seeds: list[int]) -> None:
    study = Study(main, main.read(arguments))
    assert study.sizes == {"steps": steps, "seeds": seeds, "gap": 0.5, "choose": False, "weights": None}
    assert study.is_full is (arguments == [])


def test_a_full_run_holds_bounds_and_writes_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "study.md"
    page.write_text("Before.\n\n<!-- table: means -->\nold\n<!-- end -->\n\n<!-- table: other -->\nkept\n<!-- end -->\n")
    monkeypatch.setattr("lab.study.PAGES", tmp_path)
    threads = str(torch.get_num_threads())
    quick = main(["--quick", "--out", str(tmp_path), "--threads", threads])
    assert "held" not in quick
    assert "old" in page.read_text()
    figures = main(["--out", str(tmp_path), "--threads", threads])
    assert figures["held"] == {"low": True, "high": False}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    kept = "<!-- end -->\n\n<!-- table: other -->\nkept\n<!-- end -->\n"
    assert page.read_text() == f"Before.\n\n<!-- table: means -->\n\n{TABLE}\n\n{kept}"
    assert json.loads((tmp_path / "figures.json").read_text())["options"]["steps"] == 300


def test_a_run_that_stands_in_the_log_is_not_repeated(tmp_path: Path) -> None:
    path, made = tmp_path / "deep" / "runs.csv", []

    def make(seed: int) -> dict[str, Any]:
        made.append(seed)
        return {"value": seed / 7, "curve": {"1": seed}, "nothing": float("nan")}

    first = lab.RunLog(path).by_seed({"arm": "a, b"}, [0, 1], make)
    again = lab.RunLog(path).by_seed({"arm": "a, b"}, [0, 1, 2], make)
    assert made == [0, 1, 2]
    assert [run["value"] for run in again] == [0.0, 0.142857, 0.285714]
    assert [run["curve"] for run in first] == [run["curve"] for run in again[:2]] == [{"1": 0}, {"1": 1}]
    assert path.read_text().splitlines()[0] == "arm,seed,=value,=curve,=nothing"


def test_means_and_their_errors() -> None:
    runs, others = ([{"x": value} for value in values] for values in ((1.0, 2.0, 3.0), (1.0, 1.0, 1.0)))
    assert lab.mean_of(runs, "x") == Mean(2.0, pytest.approx(1 / 3**0.5))
    assert lab.mean_of([4.0]) == (4.0, 0.0)
    assert lab.difference(runs, others, "x")[0] == 1.0
    assert f"{100 * Mean(0.5, 0.01):+.1f}" == "+50.0 ± 1.0"
    assert lab.spearman([1, 2, 3], [1, 4, 9]) == pytest.approx(1)
    assert lab.spearman([1, 2, 3], [2, 2, 2]) is None


def test_tables_are_markdown() -> None:
    rows = [("a", 1234.5, Mean(1, 0.5)), ("long", 0.12345, None), ("none", 12_345, "text")]
    assert lab.format_table(("name", "figure", "mean"), rows, ("", "", ".2f")).splitlines() == [
        "| name | figure |        mean |",
        "| ---- | -----: | ----------: |",
        "| a    |  1,234 | 1.00 ± 0.50 |",
        "| long |  0.123 |           - |",
        "| none | 12,345 |        text |",
    ]


def test_functions_take_turns_and_preparation_is_not_timed() -> None:
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": calls.append}
    seconds, _ = lab.time_interleaved(functions, rounds=2, prepare={"b": lambda: calls.append("made") or "b"})
    assert calls == ["made", "b", "a", "a", "made", "b", "made", "b", "a"]
    assert [len(values) for values in seconds.values()] == [2, 2]
    seconds = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}
    assert lab.ratio(seconds, "slow", "fast") == 3.0  # The median of the ratios within a round.
    assert lab.ratios(seconds, "slow", "fast") == [2.0, 3.0, 4.0]


def test_peak_memory_sees_what_is_freed_again() -> None:
    assert lab.growth_megabytes(lambda: torch.ones(30_000_000).sum()) > 100


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process() -> None:
    study = Study(soft_counts.main, soft_counts.main.read(["--data-dir", "nowhere", "--threads", "1"]))
    plain, kept = study.peaks([([name], {"images": 64}) for name in ("plain", "vmap_stored")])
    assert kept > 0.9 * 64 * 317_069 * 4 / 1e6 > plain
