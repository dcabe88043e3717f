"""Close the loop: write the issues of a run for a person to decide on.

`review` writes one row for each sample with an issue, with what could be done about it. The person edits the columns `action`,
`suggested_label` and `weight` in any editor of tables; `apply_review` makes the data set to train on next.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_netsim._checks import check_writable, expected
from lightning_netsim.analysis.issues import IssueReport, find_issues
from lightning_netsim.analysis.reviewed_dataset import ACTIONS
from lightning_netsim.records.record import newest_record
from lightning_netsim.records.scores import RARE

_FILE = "review.csv"
# More samples that are the same to a network are hardly copies of one.
_MOST_COPIES = 10


def review(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    issues: str | list[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the issues of a run as a CSV file to look through and edit, and print a summary.

    Each row is a sample with an issue: `sample_id`, `index`, `issues`, `label`, `suggested_label`, `action`, `weight` and the
    scores. The action that is proposed is "relabel" for a label that its neighbors contradict, if its class has four samples
    or more, "drop" for all but the first of a set of up to ten near-duplicates and for a leak, and "keep" for everything
    else, which a person has to judge.

    Args:
        run_dir: a run's log directory, of which the newest record is taken, or the directory of a record.
        output: the file to write; by default review.csv in `run_dir`.
        issues: which issues, separated by commas: label, near_duplicate, outlier, hard, leak; by default all that there can be.
        overwrite: replace a file that is there already, with whatever was edited in it.

    Returns:
        where it was written.

    Raises:
        ValueError: if there is no record, it is of a newer version, or the file is there already.
    """
    record = newest_record(run_dir)
    place = Path(run_dir) / _FILE if output is None else Path(output)
    if place.exists() and not overwrite:
        raise expected("output", "a new file", f"{str(place)!r}, which exists", "Choose another, or overwrite it.")
    check_writable("output", place.parent)
    report = find_issues(record, issues)
    table = review_table(report)
    table.to_csv(place, index=False)
    print(report)
    stage = record.meta.get("stage")
    measured = "" if stage in (None, "analyze") else f" of the set that was measured in `{stage}`"
    print(f"\nWritten to {place}: {len(table):,} samples{measured}.")
    print(f"Look them through and edit `action` ({', '.join(ACTIONS)}), `suggested_label` and `weight`.")
    print("Then, in Python, apply_review(dataset, CSV) is that data set with these decisions.")
    return place


def review_table(report: IssueReport) -> pd.DataFrame:
    """Return one row for each sample with an issue, worst first: what `review` writes."""
    table, names = report.table, report.issues
    flagged = table[[f"is_{name}_issue" for name in names]].any(axis=1) if names else pd.Series(False, index=table.index)
    rows = table[flagged].copy()
    found = [[name for name in names if row[f"is_{name}_issue"]] for row in rows.to_dict("records")]
    columns: dict[str, Any] = {
        "sample_id": rows["sample_id"],
        "index": rows["index"],
        "issues": [" ".join(row) for row in found],
    }
    if "label" in rows:
        columns["label"] = rows["label"]
    if "suggested_label" in rows:
        values = rows["suggested_label"].tolist()
        suggested = [value if "label" in row else None for value, row in zip(values, found, strict=True)]
        whole = all(isinstance(value, int) for value in values)
        columns["suggested_label"] = pd.array(suggested, dtype="Int64") if whole else suggested
    else:
        columns["suggested_label"] = None
    later = report.later_duplicates(_MOST_COPIES)
    of_classes = "label" in table and not pd.api.types.is_float_dtype(table["label"].dtype)
    counts = table["label"].value_counts() if of_classes else {}
    actions = []
    for row, index, label in zip(found, rows["index"], rows.get("label", rows["index"]), strict=True):
        is_rare = of_classes and counts[label] < RARE
        drop = "leak" in row or int(index) in later
        actions.append("drop" if drop else "relabel" if "label" in row and not is_rare else "keep")
    columns["action"] = actions
    columns["weight"] = 1.0
    for kind in ("label", "suggested_label"):
        if report.has_names and kind in columns:
            columns[f"{kind}_name"] = [report.class_name(label) for label in columns[kind]]
    columns |= {f"{name}_score": rows[f"{name}_score"].round(4) for name in names}
    if "near_duplicate_set" in rows:
        columns["near_duplicate_set"] = rows["near_duplicate_set"]
    result = pd.DataFrame(columns, index=rows.index)
    worst = rows[[f"{name}_score" for name in names]].min(axis=1) if names else rows["index"]
    return result.loc[worst.sort_values(kind="stable").index].reset_index(drop=True)
