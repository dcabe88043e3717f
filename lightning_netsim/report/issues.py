"""Say in the terminal what is wrong with a data set, in at most 100 columns of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from lightning_netsim.records.view import shorten
from lightning_netsim.report.text import WIDTH, align

_TITLES = {
    "label": "Labels that neighbors and network contradict",
    "near_duplicate": "Near-duplicates, in sets",
    "outlier": "Outliers: far from their neighbors",
    "hard": "Hard: the network is torn between two classes",
    "leak": "Leaks: near-duplicates of samples of the other set",
}
_SHOWN = 5


def format_issues(table: pd.DataFrame, issues: Sequence[str], notes: Sequence[str], class_name: Callable[[Any], str]) -> str:
    """Describe the issues of a data set: how many samples have each, and the worst ones.

    Args:
        table: see `IssueReport`.
        issues: which were looked for.
        notes: what else there is to say.
        class_name: gives the name of a label.
    """
    blocks = [[f"Issues of {len(table):,} samples", "─" * WIDTH]]
    for name in issues:
        flagged = table[table[f"is_{name}_issue"]]
        head = f"{_TITLES[name]}: {len(flagged):,} of {len(table):,} samples"
        if name == "near_duplicate" and len(flagged):
            sets = flagged["near_duplicate_set"].nunique()
            head += f", {sets:,} set{'s' * (sets > 1)}"
        blocks.append([head, *worst_samples(table, name, class_name, flagged=True)])
    blocks += [[line for text in notes for line in textwrap.wrap(text, WIDTH)]] if notes else []
    return "\n\n".join("\n".join(block) for block in blocks)


def worst_samples(
    table: pd.DataFrame, issue: str, class_name: Callable[[Any], str], number: int = _SHOWN, flagged: bool = False
) -> list[str]:
    """Return a table of the samples with the worst scores of an issue.

    Args:
        table: see `IssueReport`.
        issue: which.
        class_name: gives the name of a label.
        number: how many samples at most.
        flagged: only samples that have the issue.
    """
    rows = table[table[f"is_{issue}_issue"]] if flagged else table
    rows = rows[rows[f"{issue}_score"].notna()].sort_values(f"{issue}_score", kind="stable").head(number)
    if not len(rows):
        return []
    names = ["label"] if "label" in rows else []
    names += ["suggested_label"] if issue == "label" else ["near_duplicate_set"] if issue == "near_duplicate" else []
    cells = [["sample", *(name.replace("near_duplicate_", "").replace("_", " ") for name in names), "score"]]
    for row in rows.to_dict("records"):
        values = [str(row[name]) if name == "near_duplicate_set" else shorten(class_name(row[name]), 20) for name in names]
        cells.append([shorten(row["sample_id"], 26), *values, f"{row[f'{issue}_score']:.3f}"])
    return align(cells, left=1 + len(names))
