from __future__ import annotations

import pandas as pd
import pytest

from lightning_netsim import find_issues
from lightning_netsim.analysis.issues import IssueReport
from lightning_netsim.records.record import Record
from lightning_netsim.report.issues import WIDTH, format_issues, worst_samples
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
        {"labels": None},
        {"k": 1},
        {"margin": None},
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
    assert [line.split()[:2] for line in block[1:]] == [
        ["sample", "set"],
        ["0", "0"],
        ["1", "0"],
        ["2", "0"],
        ["5", "1"],
        ["9", "1"],
    ]


def test_what_was_not_looked_for_is_said_with_the_reason() -> None:
    text = str(report_of(labels=None, margin=None))
    for issue, reason in (("label", "no labels"), ("hard", "earlier version"), ("leak", "with each other")):
        [line] = [line for line in text.splitlines() if line.startswith(f"Not looked for: {issue}.")]
        assert reason in line
    assert "Not looked for" not in str(find_issues(clear_record(), ["label"]))
    assert "Labels" not in str(find_issues(clear_record(), ["hard"]))


def test_nothing_at_all() -> None:
    text = str(find_issues(clear_record(), []))
    assert text.splitlines() == ["Issues of 45 samples", "─" * WIDTH]
    assert repr(find_issues(clear_record(), [])) == "IssueReport()"


def test_the_representation_counts() -> None:
    report = report_of()
    counts = {issue: int(report.table[f"is_{issue}_issue"].sum()) for issue in report.issues}
    assert repr(report) == f"IssueReport({', '.join(f'{issue}: {count}' for issue, count in counts.items())})"


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


def test_no_samples_with_the_issue_make_no_table() -> None:
    assert worst_samples(made_up().assign(is_hard_issue=False), "hard", str, flagged=True) == []
    text = format_issues(made_up().assign(is_hard_issue=False), ["hard"], {}, str)
    assert text.splitlines()[-1].endswith(": 0 of 7 samples")


def test_names_of_classes() -> None:
    report = report_of(class_names=["ape", "bee", "cat"])
    assert [report.class_name(label) for label in (0, 2, 7, -1, None, pd.NA)] == ["ape", "cat", "7", "-1", "", ""]
    assert [report_of(class_names={"0": "ape"}).class_name(label) for label in (0, 1)] == ["ape", "1"]
    assert report_of(class_names=None).class_name(1) == "1"
    assert report_of(class_names={"0": "ape", "1": "bee", "2": "cat"}).class_name(2) == "cat"
    assert report_of().class_name(0.123456) == "0.1235"


def values() -> Record:
    gradients, _ = units(40)
    return record_of(gradients, 5, (gradients[:, 0] + (gradients[:, 1] > 0.6) * 2).tolist())


def test_the_summary_ends_with_the_worst_labels() -> None:
    record = clear_record(class_names=["ape", "bee", "cat"])
    report = find_issues(record)
    lines = lines_of(format_summary(record), "Five worst label scores")
    assert f"{len(report.found('label'))} samples" in lines[0]
    assert [line.split()[0] for line in lines[2:7]] == [str(index) for index in report.ranked("label")[:5]]
    assert "Five worst label scores" not in format_summary(clear_record(labels=None))
    of_values = lines_of(format_summary(values()), "Five worst label scores")
    assert "network" not in of_values[0]
    assert "far from" in of_values[0]
    assert len(str(find_issues(values()))) > 0


def test_the_summary_of_samples_without_any_neighbor_names_no_labels() -> None:
    record = clear_record()
    empty = Record(record.samples, record.neighbors.head(0), record.meta)
    assert "Five worst label scores" not in format_summary(empty)
