"""What a review writes for a person to look through."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lightning_netsim import find_issues
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.review import review, review_table
from lightning_netsim.cli import main
from lightning_netsim.records.record import SCHEMA_VERSION, write_record
from tests.issue_oracles import flawed, leaking

NAMES = ["ape", "None", "007"]


def test_each_sample_with_an_issue_has_a_row_worst_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = flawed(class_names=NAMES)
    write_record(tmp_path / "netsim" / "epoch=1-step=2", record)
    path = review(tmp_path)
    assert path == tmp_path / "review.csv"  # Beside the records, which the next epoch may replace.
    report = find_issues(record)
    printed = capsys.readouterr().out
    assert printed.startswith(str(report))
    assert str(path) in printed
    table = pd.read_csv(path, keep_default_na=False, dtype={"suggested_label": str})
    flags = report.table.set_index("index")[[f"is_{issue}_issue" for issue in report.issues]]
    assert sorted(table["index"]) == flags.index[flags.any(axis=1)].tolist()
    scores = report.table.set_index("index")[[f"{issue}_score" for issue in report.issues]]
    worst = scores.loc[table["index"]].min(axis=1).tolist()
    assert worst == sorted(worst)
    for row in table.to_dict("records"):
        source = report.table.loc[row["index"]]
        issues = [issue for issue in report.issues if source[f"is_{issue}_issue"]]
        assert row["issues"].split() == issues
        assert row["label"] == source["label"]
        assert row["label_name"] == NAMES[source["label"]]
        assert row["suggested_label"] == (str(source["suggested_label"]) if "label" in issues else "")
        assert row["suggested_label_name"] == (NAMES[source["suggested_label"]] if "label" in issues else "")
        assert row["weight"] == 1
        for issue in report.issues:
            assert row[f"{issue}_score"] == pytest.approx(source[f"{issue}_score"], abs=5e-5)
        later = row["index"] in (12, 30)
        assert row["action"] == ("drop" if later else "relabel" if "label" in issues else "keep")
    assert set(table["action"]) == {"drop", "relabel", "keep"}


def test_leaks_are_to_be_dropped() -> None:
    table = review_table(find_issues(leaking(), ["leak"]))
    assert sorted(table["index"]) == [0, 1, 2]
    assert table["action"].tolist() == ["drop"] * 3
    assert table["suggested_label"].isna().all()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = write_record(tmp_path / "r", flawed())
    written = review(path)
    written.write_text("edited")
    with pytest.raises(NetsimError, match=r"review\.csv', which exists"):
        review(path)
    assert written.read_text() == "edited"
    assert review(path, overwrite=True) == written
    assert written.read_text().startswith("sample_id,")


def test_another_file_and_only_some_issues(tmp_path: Path) -> None:
    path = write_record(tmp_path / "r", flawed())
    for issues in ("near_duplicate,hard", ["near_duplicate", "hard"]):
        table = pd.read_csv(review(path, tmp_path / "new" / "mine.csv", issues, overwrite=True))
        assert sorted(table["index"]) == [3, 12, 30]
        assert "label_score" not in table
        assert set(table["issues"]) == {"near_duplicate"}
    assert not (path / "review.csv").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: review(path / "nowhere"), "which does not exist"),
        (lambda path: review(path, issues="lable"), "'lable'.*Did you mean 'label'"),
        (lambda path: review(path, issues="leak"), "'leak'.*with each other"),
        (lambda path: review(path.parent), "a record|a directory"),
        (lambda path: review(path, output=path / "meta.json" / "x.csv"), "writable directory"),
    ],
)
def test_what_cannot_be_reviewed(tmp_path: Path, call: Callable[[Path], Path], words: str) -> None:
    path = write_record(tmp_path / "r", flawed())
    with pytest.raises(NetsimError, match=words):
        call(path)
    assert list(tmp_path.rglob("*.csv")) == []


def test_the_verb_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path / "netsim" / "epoch=0-step=1", flawed())
    assert main(["review", str(tmp_path)]) is None
    assert "Issues of 45 samples" in capsys.readouterr().out
    again = pd.read_csv(tmp_path / "review.csv")
    arguments = [str(tmp_path), "--output", str(tmp_path / "few.csv"), "--issues", "near_duplicate"]
    main(["review", *arguments])
    assert len(pd.read_csv(tmp_path / "few.csv")) == 3 < len(again)
    main(["review", *arguments, "--overwrite", "true"])
    for bad, words in (
        ([str(tmp_path)], "which exists"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([*arguments[:3], "--issues", "dirt", "--overwrite", "true"], "'dirt'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["review", *bad])
        assert str(stop.value).startswith("netsim: Expected ")
        assert words in str(stop.value).splitlines()[-1]
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(SystemExit, match="Update lightning_netsim"):
        main(["review", str(tmp_path), "--overwrite", "true"])
    for wrong in ([], [str(tmp_path), "--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            main(["review", *wrong])
        assert stop.value.code == 2


def test_large_sets_and_rare_classes_are_not_changed_by_default() -> None:
    report = find_issues(flawed())
    for size in (10, 11):
        sets = [0] * size + [-1] * (45 - size)
        table = report.table.assign(near_duplicate_set=sets, is_label_issue=True)
        table.loc[20:22, "label"], table.loc[30:33, "label"] = 77, 78
        proposed = review_table(replace(report, table=table))
        assert (proposed["action"] == "drop").sum() == (9 if size == 10 else 0)
        assert set(proposed.loc[proposed["label"] == 77, "action"]) == {"keep"}
        assert set(proposed.loc[proposed["label"] == 78, "action"]) == {"relabel"}
