from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lightning_netsim.records.record import write_record
from lightning_netsim.report.summary import _fit, format_summary
from tests.report.made_up import NAMES, extremes, make_record


def block(text: str, start: str) -> list[str]:
    """Return the lines below the one that begins with `start`, up to the next empty line."""
    lines = text.split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith(start))
    return lines[first + 1 : [*lines, ""].index("", first)]


def test_the_right_five_samples_are_named() -> None:
    record = make_record(n=60)
    record.samples.loc[extremes(record)[0][0], ["soft_count", "neighbor_fraction"]] = np.nan  # left out, so not isolated
    record.samples.loc[extremes(record)[1][0], "prediction"] = 11
    record.meta["class_names"] = [*NAMES, "ten", "eleven"]
    text = format_summary(record)
    samples, names = record.samples, record.meta["class_names"]
    for title, expected in zip(("Five most isolated", "Five most crowded"), extremes(record), strict=True):
        lines = block(text, title)
        wrong = [samples["label"][index] != samples["prediction"][index] for index in expected]
        assert ["≠" in line for line in lines[1:]] == wrong
        header, *rows = [line.replace("≠", "").split() for line in lines]
        assert header == ["sample", "label", "prediction", "soft", "count", "fraction"]
        for (name, label, prediction, count, fraction), index in zip(rows, expected, strict=True):
            assert (name, label) == (str(index), NAMES[samples["label"][index]])
            assert prediction == names[samples["prediction"][index]]
            assert float(count) == pytest.approx(samples["soft_count"][index], abs=0.06)
            assert float(fraction) == pytest.approx(samples["neighbor_fraction"][index], abs=0.0006)
    isolated = extremes(record)[0][0]
    nearest = record.neighbors[record.neighbors["index"] == isolated].iloc[0]
    own, other = (NAMES[samples["label"][int(index)]] for index in (isolated, nearest["neighbor"]))
    line, mark = block(text, "Kernel neighbors")[0], "" if own == other else "≠ "
    assert line.startswith(f"  {isolated} ({own})")
    assert line.split("→  ")[1].startswith(f"{int(nearest['neighbor'])} ({nearest['similarity']:.3f}, {mark}{other})")


def test_the_neighbor_fraction_is_given_overall_and_by_class() -> None:
    record = make_record(n=60)
    rows = {line.split()[0]: line.split()[1:] for line in block(format_summary(record), "Neighbor fraction")}
    groups = {"all": record.samples, **{NAMES[label]: group for label, group in record.samples.groupby("label")}}
    assert list(rows) == ["class", "all", *NAMES]
    for name, group in groups.items():
        fraction = group["neighbor_fraction"]
        assert int(rows[name][0]) == len(group)
        wanted = [fraction.mean(), fraction.min(), fraction.max()]
        assert [float(number) for number in rows[name][1:]] == pytest.approx(wanted, abs=0.0006)


def test_many_classes_are_cut_to_the_extremes() -> None:
    record = make_record(n=60, class_names=None)
    record.samples["label"] = np.arange(60) // 2
    lines = block(format_summary(record), "Neighbor fraction")
    assert len(lines) == 1 + 1 + 20 + 1
    assert "10 between them" in lines[-1]
    lowest = record.samples.groupby("label")["neighbor_fraction"].mean().idxmin()
    assert lines[2].split()[0] == str(lowest)


def test_quality_says_recall_and_what_was_left_out() -> None:
    text = format_summary(make_record(n=20, recall=0.953, num_left_out=2))
    assert "Recall@10 of the neighbor table: 0.953" in text
    assert "Samples left out: 2 (no usable gradient" in text
    assert "not measured" in format_summary(make_record(n=20, recall=None))
    left_out = make_record(n=20)
    left_out.samples.loc[[3, 4, 5], "soft_count"] = np.nan
    assert "Samples left out: 3" in format_summary(left_out)


def test_tables_and_figures_are_located(tmp_path: Path) -> None:
    path = write_record(tmp_path / "epoch=4-step=225", make_record(n=12))
    (path / "counts.png").touch()
    text = format_summary(make_record(n=12), path)
    assert f"Written to {path}" in text
    assert "  tables   meta.json, neighbors.parquet, samples.parquet" in text
    assert "  figures  counts.png" in text
    assert "Written to" not in format_summary(make_record(n=12))


def test_lines_fit_into_a_hundred_columns_and_reading_takes_three() -> None:
    record = make_record(n=60, class_names=["Staffordshire bull terrier " * 3 + str(i) for i in range(10)])
    record.samples["sample_id"] = [f"train/n0{i}/" + "x" * 80 for i in range(60)]
    record.samples["soft_count"] *= 1e5
    text = format_summary(record)
    assert max(map(len, text.split("\n"))) <= 100
    assert len(block(text, "How to read this")) == 3


def test_neighbors_that_do_not_fit_become_an_ellipsis_that_does() -> None:
    items = ["aaaa", "bbb", "ccccc"]
    for width in range(7, 25):
        text = _fit(items, width)
        assert len(text) <= width
        assert text.split() == items if width >= 16 else text.endswith("  …")


def test_few_samples_without_labels_or_counts() -> None:
    record = make_record(n=3, k=1, labels=False)
    text = format_summary(record)
    assert "label" not in "\n".join(block(text, "Five most isolated"))
    assert len(block(text, "Five most isolated")) == 1 + 3
    record.samples["soft_count"] = np.nan
    text = format_summary(dataclasses.replace(record, neighbors=record.neighbors.iloc[:0]))
    assert "no sample has a count" in text
    assert "Five most" not in text
