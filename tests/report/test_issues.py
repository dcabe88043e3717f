from __future__ import annotations

import pandas as pd
import pytest

from lightning_netsim import find_issues
from lightning_netsim.analysis.issues import IssueReport
from lightning_netsim.records.record import Record
from lightning_netsim.report.issues import WIDTH, plot_issues, worst_samples
from lightning_netsim.report.summary import format_summary
from tests.issue_oracles import clear_record, record_of, units

LONG = [f"photographs/of/a/summer/that/went/on/and/on/{row:05d}.jpeg" for row in range(45)]
NAMES = [f"a class by the name of number {c}, which is long" for c in range(3)]


def report_of(**options: object) -> IssueReport:
    return find_issues(clear_record(**options))


def lines_of(text: str, title: str) -> list[str]:
    """Return the block of lines that begins with a title."""
    [block] = [block for block in text.split("\n\n") if block.startswith(title)]
    return block.splitlines()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ids": LONG, "class_names": NAMES},
        {"labels": [NAMES[int(c)] for c in units(45)[1]], "class_names": NAMES},
        {"labels": None, "k": 1, "margin": None},
    ],
)
def test_no_line_is_too_long(options: dict[str, object]) -> None:
    text = str(report_of(**options))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert max(map(len, format_summary(clear_record(**options)).splitlines())) <= WIDTH


def test_the_text_says_how_many_and_shows_the_worst() -> None:
    report = report_of(class_names=["ape", "bee", "cat"])
    text = str(report)
    assert text.startswith("Issues of 45 samples\n" + "─" * WIDTH)
    found = report.found("label")
    block = lines_of(text, "Labels")
    assert block[0].endswith(f": {len(found)} of 45 samples")
    assert block[1].split() == ["sample", "label", "suggested", "label", "score"]
    assert len(block) == 2 + min(5, len(found))
    names = ["ape", "bee", "cat"]
    for line, row in zip(block[2:], found.to_dict("records"), strict=False):
        wanted = [str(row["sample_id"]), names[row["label"]], names[row["suggested_label"]], f"{row['label_score']:.3f}"]
        assert line.split() == wanted
    assert len(lines_of(text, "Near-duplicates")) == 1


def test_sets_of_near_duplicates_are_numbered() -> None:
    gradients, _ = units(30)
    gradients[5] = gradients[9]
    gradients[[1, 2]] = gradients[0]
    block = lines_of(str(find_issues(record_of(gradients, 5))), "Near-duplicates")
    assert block[0].endswith(": 5 of 30 samples, 2 sets")
    assert [" ".join(line.split()[:2]) for line in block[1:]] == ["sample set", "0 0", "1 0", "2 0", "5 1", "9 1"]


def test_what_was_not_looked_for_is_said_with_the_reason() -> None:
    text = str(report_of(labels=None, margin=None))
    for issue, reason in (("label", "no labels"), ("hard", "earlier version"), ("leak", "with each other")):
        [line] = [line for line in text.splitlines() if line.startswith(f"Not looked for: {issue}.")]
        assert reason in line
    assert "Not looked for" not in str(find_issues(clear_record(), ["label"]))
    assert str(find_issues(clear_record(), [])).splitlines() == ["Issues of 45 samples", "─" * WIDTH]


def made_up() -> pd.DataFrame:
    scores = [0.9, 0.1, float("nan"), 0.1, 0.4, 0.2, 0.3]
    flags = [score < 0.25 for score in scores]
    names = [f"s{row}" for row in range(7)]
    return pd.DataFrame({"sample_id": names, "index": range(7), "is_hard_issue": flags, "hard_score": scores})


def test_the_worst_come_first_ties_in_their_order_and_unknown_scores_never() -> None:
    names = [line.split()[0] for line in worst_samples(made_up(), "hard", str)[1:]]
    assert names == ["s1", "s3", "s5", "s6", "s4"]
    assert [line.split()[0] for line in worst_samples(made_up(), "hard", str, number=2)[1:]] == ["s1", "s3"]
    assert [line.split()[0] for line in worst_samples(made_up(), "hard", str, flagged=True)[1:]] == ["s1", "s3", "s5"]
    assert [line.split()[0] for line in worst_samples(made_up(), "hard", str, number=9)[1:]][-1] == "s0"


def test_the_summary_ends_with_the_worst_labels() -> None:
    record = clear_record(class_names=["ape", "bee", "cat"])
    report = find_issues(record)
    lines = lines_of(format_summary(record), "Five worst label scores")
    assert f"{len(report.found('label'))} samples" in lines[0]
    assert [line.split()[0] for line in lines[2:7]] == [str(index) for index in report.ranked("label")[:5]]
    assert "Five worst label scores" not in format_summary(clear_record(labels=None))
    of_values = record_of(units(40)[0], 5, units(40)[0][:, 0].tolist())
    assert "far from" in lines_of(format_summary(of_values), "Five worst label scores")[0]
    empty = Record(record.samples, record.neighbors.head(0), record.meta)
    assert "Five worst label scores" not in format_summary(empty)


def test_the_figure_shows_the_worst_of_each_issue_first() -> None:
    table = made_up().assign(
        is_leak_issue=False, leak_score=0.5, is_near_duplicate_issue=[True, True, False, True, True, False, False]
    )
    table["near_duplicate_score"], table["near_duplicate_set"] = 0.0, [1, 0, -1, 0, 1, -1, -1]
    asked: list[int] = []
    figure = plot_issues(table, ["hard", "near_duplicate", "leak"], str, asked.append, columns=3)
    assert asked == [1, 3, 5, 1, 3, 0]
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [word for word in words if word.startswith("set")] == ["set 0", "set 0", "set 1"]
    assert "leaks" not in words
    assert "3 of 7" in words
