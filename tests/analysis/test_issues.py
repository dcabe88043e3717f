"""find_issues against loops over samples and pairs, and on small sets in which the issues are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import SimilarityMonitor, analyze, find_issues
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.issues import IssueReport
from lightning_netsim.functional.label_quality import OWN_VOTE, rank_weights
from lightning_netsim.records.record import Record, write_record
from lightning_netsim.records.scores import ISSUES, THRESHOLDS
from tests import issue_oracles as slow
from tests.callbacks.small import train, watching
from tests.issue_oracles import Small, clear_record, planted, record_of, units

NAMES = ["ape", "bee", "cat"]
SELF = ("label", "near_duplicate", "outlier", "hard")
OTHER = ("label", "outlier", "hard", "leak")


def with_copies(**options: Any) -> Record:
    """Return a record with a pair, a chain through a third sample, and more than k copies of one sample."""
    gradients, classes = units(50)
    gradients[11] = gradients[10]
    gradients[21:23] = gradients[20]
    gradients[30:40] = gradients[30]
    near = gradients[41] + 1e-2 * gradients[1]
    gradients[42] = near / np.linalg.norm(near)
    return record_of(gradients, 4, classes.tolist(), **options)


def against(labels: Any = None, k: int = 6, **options: Any) -> Record:
    """Return a record of 25 samples against 40 others, of which the first three are the same."""
    (gradients, classes), (others, _) = units(25), units(40, seed=5)
    gradients[:3] = others[7]
    return record_of(gradients, k, classes.tolist(), others, labels, classes.tolist(), [0.5, *np.linspace(0, 1, 24)], **options)


def strings(names: list[str] | None) -> Record:
    labels = [NAMES[int(c + (row % 8 == 3)) % 3] for row, c in enumerate(units(45)[1])]
    return clear_record(labels=labels, **({} if names is None else {"class_names": names}))


def values(*, missing: bool = False, **options: Any) -> Record:
    gradients, _ = units(40)
    labels = gradients[:, 0] + (np.arange(40) % 10 == 3) * 2.0
    if missing:
        labels[[4, 5]] = math.nan
    return record_of(gradients, 5, labels.tolist(), **options)


SPARSE = [1000 - 3 * row for row in range(45)]
CASES: dict[str, tuple[Callable[[], Record], tuple[str, ...]]] = {
    "classes": (clear_record, SELF),
    "of an earlier version": (lambda: clear_record(predictions=None, margin=None), SELF[:3]),
    "no margin": (lambda: clear_record(margin=None), SELF[:3]),
    "margins of zero": (lambda: clear_record(margin=[0.0] * 30 + [0.5] * 15), SELF),
    "unknown margins": (lambda: clear_record(margin=[math.nan] * 5 + [0.5] * 40), SELF),
    "negative labels": (lambda: clear_record(labels=[-1 if c == 0 else -5 for c in units(45)[1]]), SELF),
    "classes of one": (lambda: clear_record(labels=list(range(100, 145))), SELF),
    "predictions beyond the labels": (lambda: clear_record(predictions=[7] * 45), SELF),
    "left out": (lambda: clear_record(left_out=[0, 7, 44]), SELF),
    "a part of the data set": (lambda: clear_record(index=SPARSE, ids=[f"{i}.png" for i in SPARSE]), SELF),
    "k=2": (lambda: clear_record(k=2), ("label", "hard")),
    "k=3": (lambda: clear_record(k=3), SELF),
    "copies": (with_copies, SELF[:3]),
    "other": (lambda: against([int(c) for c in units(40)[1]]), OTHER),
    "other, classes of its own": (lambda: against([int(c) + 2 for c in units(40)[1]]), OTHER),
    "other, no labels": (against, OTHER[1:]),
    "equal distances": (lambda: record_of(np.eye(8), 4, [0, 1] * 4), SELF[:3]),
    "other, k=1": (lambda: against([1] * 40, k=1), ("label", "hard")),
    "other, left out": (lambda: against([1] * 40, left_out=[0, 9]), OTHER),
    "values": (values, SELF[:3]),
    "other, labels of another kind": (lambda: against(["abc"[c] for c in units(40)[1]]), OTHER[1:]),
    "values, some missing": (lambda: values(missing=True), SELF[:3]),
    "no labels": (lambda: clear_record(labels=None), SELF[1:]),
}


def numbers(column: Any) -> dict[int, float]:
    return {int(index): float(value) for index, value in column.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_score_against_loops(case: str) -> None:
    build, issues = CASES[case]
    record = build()
    report = find_issues(record)
    table = report.table.set_index("index")
    assert report.issues == issues
    assert set(report.skipped) == set(ISSUES) - set(issues)
    assert report.table["sample_id"].tolist() == record.samples["sample_id"].tolist()
    scores: dict[str, dict[int, float]] = {
        "near_duplicate": slow.duplicate_scores(record) if "near_duplicate" in issues else {},
        "outlier": slow.outlier_scores(record) if "outlier" in issues else {},
        "leak": slow.leak_scores(record) if "leak" in issues else {},
        "hard": slow.hard_scores(record) if "hard" in issues else {},
    }
    levels = dict(THRESHOLDS)
    if "label" in issues:
        is_value = record.samples["label"].dtype == float
        levels["label"] = THRESHOLDS["value_label" if is_value else "label"]
        if not is_value and "margin" in record.samples and "prediction" not in record.samples:
            record = dataclasses.replace(record, samples=record.samples.drop(columns="margin"))
        pairs = slow.value_scores(record) if is_value else slow.class_scores(record)
        scores["label"] = {index: score for index, (score, _) in pairs.items()}
        known = [index for index, (score, _) in pairs.items() if not math.isnan(score)]
        suggested = [pairs[index][1] for index in known]
        assert table["suggested_label"][known].tolist() == (pytest.approx(suggested) if is_value else suggested)
    for issue in issues:
        found = numbers(table[f"{issue}_score"])
        assert found == pytest.approx(scores[issue], abs=1e-9, nan_ok=True), issue
        assert all(math.isnan(score) or 0 <= score <= 1 for score in found.values())
        assert table[f"is_{issue}_issue"].tolist() == [score < levels[issue] for score in found.values()]
    if "near_duplicate" in issues:
        assert {frozenset(each) for each in report.near_duplicate_sets} == slow.duplicate_sets(record, levels["near_duplicate"])


@pytest.mark.parametrize(("names", "known"), [(NAMES, dict(enumerate(NAMES))), (None, {})])
def test_labels_that_are_strings(names: list[str] | None, known: dict[int, str]) -> None:
    record = strings(names)
    table = find_issues(record).table.set_index("index")
    pairs = slow.class_scores(record, known)
    assert numbers(table["label_score"]) == pytest.approx({index: score for index, (score, _) in pairs.items()})
    assert table["suggested_label"].to_dict() == {index: label for index, (_, label) in pairs.items()}
    assert table["is_label_issue"].any()


def test_a_sample_left_out_has_no_scores_and_no_issue() -> None:
    report = find_issues(clear_record(left_out=[0, 4]), thresholds=dict.fromkeys(THRESHOLDS, 1.0))
    rows = report.table[report.table["index"].isin([0, 4])]
    for issue in ("label", "near_duplicate", "outlier"):
        assert rows[f"{issue}_score"].isna().all()
        assert not rows[f"is_{issue}_issue"].any()
        assert not {0, 4} & set(report.ranked(issue))
        assert len(report.ranked(issue)) == 43
    assert rows["near_duplicate_set"].tolist() == [-1, -1]
    assert rows["suggested_label"].tolist() == rows["label"].tolist()


def test_a_tie_keeps_the_label() -> None:
    gradients = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    first, second = rank_weights(torch.ones(1, 2, dtype=torch.bool))[0].tolist()
    tie = (first - second) / OWN_VOTE  # so much margin makes the network's label as strong as the nearest neighbor's
    for own, more, suggested in ((0, 0.0, 0), (1, 0.0, 1), (0, 0.01, 1), (1, -0.01, 0)):
        record = record_of(gradients[:1], 2, [own], gradients[1:], [0, 1], [1], [tie + more])
        row = find_issues(record, ["label"]).table.iloc[0]
        assert (row["suggested_label"], bool(row["is_label_issue"])) == (suggested, own != suggested)
        assert row["label_score"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("reference", ["self", "training"])
def test_all_samples_the_same(reference: str) -> None:
    same = np.tile([[0.6, 0.8]], (12, 1))
    others = {} if reference == "self" else {"reference": same, "reference_labels": [1] * 12}
    report = find_issues(record_of(same, 4, [0] * 3 + [1] * 9, margin=[0.0] * 12, predictions=[1] * 12, **others))
    issue = "near_duplicate" if reference == "self" else "leak"
    assert report.table[f"{issue}_score"].tolist() == [0.0] * 12
    assert report.table[f"is_{issue}_issue"].all()
    assert not report.table["is_outlier_issue"].any()
    if reference == "self":
        assert sorted(len(each) for each in report.near_duplicate_sets)[-1] >= 5
        assert sum(map(len, report.near_duplicate_sets)) == 12


@pytest.mark.parametrize("copies", [1, 2, 5, 9])
def test_copies_are_copies_within_the_rounding_of_float32(copies: int) -> None:
    exact = record_of(np.concatenate([units(12, dimension=9)[0]] * (copies + 1)), 6)
    noise = np.random.default_rng(0).uniform(-2e-7, 2e-7, size=len(exact.neighbors))
    record = dataclasses.replace(exact, neighbors=exact.neighbors.assign(similarity=exact.neighbors["similarity"] + noise))
    report = find_issues(record)
    assert {row % 12 for each in report.near_duplicate_sets for row in each} == set(range(12))
    assert all(len({row % 12 for row in each}) == 1 for each in report.near_duplicate_sets)
    assert report.table["is_near_duplicate_issue"].all()
    assert not report.table["is_outlier_issue"].any()


def test_samples_without_activations_are_copies_of_none_and_no_leaks() -> None:
    record = with_copies()
    other = record_of(units(50, seed=5)[0], 4, left_out=[10, 41])  # one of each of two pairs
    found = find_issues(dataclasses.replace(record, activation_neighbors=other.neighbors), ["near_duplicate"])
    assert {10, 11, 41, 42}.isdisjoint(found.found("near_duplicate")["index"])
    assert {20, 21, 22} <= set(found.found("near_duplicate")["index"])
    assert {10, 11} <= set(find_issues(record, ["near_duplicate"]).found("near_duplicate")["index"])
    record = against()
    known = record.neighbors[record.neighbors["index"] != 0]
    assert find_issues(record, ["leak"]).found("leak")["index"].tolist()[:3] == [0, 1, 2]
    found = find_issues(dataclasses.replace(record, activation_neighbors=known), ["leak"])
    assert found.found("leak")["index"].tolist()[:2] == [1, 2]
    assert np.isnan(found.table["leak_score"][0])


def test_a_chain_of_pairs_is_one_set_whoever_lists_whom() -> None:
    record = clear_record()
    for index, neighbor in ((4, 7), (7, 2)):
        row = (record.neighbors["index"] == index) & (record.neighbors["rank"] == 1)
        record.neighbors.loc[row, ["neighbor", "similarity"]] = [neighbor, 1.0]
    assert find_issues(record).near_duplicate_sets == [[2, 4, 7]]


def test_sets_of_copies_even_of_more_than_k() -> None:
    report = find_issues(with_copies())
    assert report.near_duplicate_sets == [[*range(30, 40)], [20, 21, 22], [10, 11], [41, 42]]
    assert report.later_duplicates() == {*range(31, 40), 21, 22, 11, 42}
    assert set(report.found("near_duplicate")["index"]) == {*range(30, 40), 20, 21, 22, 10, 11, 41, 42}
    assert report.table["near_duplicate_set"].value_counts().to_dict() == {-1: 33, 0: 10, 1: 3, 2: 2, 3: 2}


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(45)), st.sampled_from(["classes", "strings", "copies", "values", "left out"]))
def test_the_order_of_the_tables_does_not_matter(order: list[int], case: str) -> None:
    record = strings(NAMES) if case == "strings" else CASES[case][0]()
    order = [*order, *range(45, len(record.samples))]
    order = [row for row in order if row < len(record.samples)]
    shuffled = record.neighbors.sample(frac=1, random_state=order[0])
    other = dataclasses.replace(record, samples=record.samples.iloc[order], neighbors=shuffled)
    before, after = find_issues(record), find_issues(other)
    assert after.table["index"].tolist() == [record.samples["index"].iloc[row] for row in order]
    drop = ["near_duplicate_set"]
    one = before.table.drop(columns=drop).sort_values("index").reset_index(drop=True)
    two = after.table.drop(columns=drop).sort_values("index").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, two, check_exact=False, rtol=1e-12)
    assert set(map(frozenset, before.near_duplicate_sets)) == set(map(frozenset, after.near_duplicate_sets))


def test_the_record_is_left_alone() -> None:
    record = clear_record()
    samples, neighbors, meta = record.samples.copy(), record.neighbors.copy(), json.dumps(record.meta)
    report = find_issues(record)
    report.table.loc[:, "label_score"] = 0.0
    report.table["sample_id"] = "changed"
    pd.testing.assert_frame_equal(record.samples, samples)
    pd.testing.assert_frame_equal(record.neighbors, neighbors)
    assert json.dumps(record.meta) == meta


@pytest.mark.parametrize("issue", ISSUES[:4])
def test_thresholds_say_what_is_an_issue_and_leave_the_scores(issue: str) -> None:
    record, plain = clear_record(), find_issues(clear_record())
    middle = float(plain.table[f"{issue}_score"].median())
    report = find_issues(record, thresholds={issue: middle})
    assert report.table[f"{issue}_score"].equals(plain.table[f"{issue}_score"])
    assert 0 < len(report.found(issue)) == int((plain.table[f"{issue}_score"] < middle).sum())
    for other in set(SELF) - {issue}:
        assert report.found(other)["index"].equals(plain.found(other)["index"])
    assert report.found(issue)["index"].tolist() == report.ranked(issue)[: len(report.found(issue))]


@pytest.mark.parametrize("issues", [["hard", "label"], iter(["hard", "label"]), "hard,label"])
def test_only_what_is_asked_for(issues: Any) -> None:
    report = find_issues(clear_record(), issues)
    assert report.issues == ("label", "hard")
    assert report.skipped == {}
    assert "outlier" not in str(report.table.columns.tolist()) + str(report).lower()
    assert find_issues(clear_record(), []).issues == ()
    for method in (report.found, report.ranked):
        with pytest.raises(NetsimError, match="'outlier'"):
            method("outlier")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: find_issues(clear_record(), ["labels"]), "`issues`.*'labels'.*Did you mean 'label'"),
        (lambda: find_issues(clear_record(), thresholds={"leek": 0.1}), "`thresholds`.*'leek'.*Did you mean 'leak'"),
        (lambda: find_issues(clear_record(), thresholds={"leak": -1}), "leak.*positive number"),
        (lambda: find_issues(clear_record(), thresholds={"hard": "much"}), "hard.*positive number"),
        (lambda: find_issues(clear_record(labels=None), ["label"]), "'label'.*no labels"),
        (lambda: find_issues(against(), ["label"]), "'label'.*neighbors have no labels"),
        (lambda: find_issues(clear_record(margin=None), ["hard"]), "'hard'.*earlier version"),
        (lambda: find_issues(clear_record(), ["leak"]), "'leak'.*with each other"),
        (lambda: find_issues(against(), ["near_duplicate"]), "'near_duplicate'.*another set"),
        (lambda: find_issues(clear_record(k=1), ["near_duplicate"]), "'near_duplicate'.*larger k"),
        (lambda: find_issues(clear_record(k=1), ["outlier"]), "'outlier'.*larger k"),
        (lambda: find_issues(clear_record()).found("leak"), "'leak'.*with each other"),
        (lambda: find_issues(clear_record()).ranked("liak"), "'liak'"),
        (lambda: find_issues(SimilarityMonitor()), "record|run"),
        (lambda: find_issues(clear_record(plan={"kind": "queries"})), "neighbors of single samples.*`analyze`"),
        (lambda: find_issues("nowhere"), "'nowhere', which does not exist"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(NetsimError, match=words):
        call()


@pytest.fixture(scope="module")
def measured() -> Any:
    inputs, labels, wrong, sets = planted()
    model = Small()
    model.learn(inputs, labels)
    loader = DataLoader(TensorDataset(inputs, labels), 64)
    options = {"progress": False, "compare_activations": False}
    analysis = analyze(model, loader, k=10, class_names=["a", "b", "c", "d"], **options)
    queries = torch.cat([inputs[40:60], inputs[40:60] + torch.randn(20, 8, generator=torch.Generator().manual_seed(9))])
    seen = DataLoader(TensorDataset(queries, labels[40:60].repeat(2)), 64)
    return analysis, analyze(model, seen, loader, k=10, **options), wrong, sets


def test_planted_issues_are_found(measured: Any) -> None:
    analysis, validation, wrong, sets = measured
    report = find_issues(analysis)
    is_wrong = report.table["index"].isin(wrong)
    assert roc_auc_score(is_wrong, 1 - report.table["label_score"]) > 0.95
    assert {frozenset(each) for each in report.near_duplicate_sets} == {frozenset(each) for each in sets}
    leaks = find_issues(validation).found("leak")
    assert sorted(leaks["index"]) == list(range(20))
    assert report.ranked("label")[:10] == report.found("label")["index"].tolist()[:10]


def test_a_run_may_be_a_record_a_path_an_analysis_or_a_monitor(measured: Any, tmp_path: Path) -> None:
    analysis = measured[0]
    report = find_issues(analysis)
    path = write_record(tmp_path / "netsim" / "epoch=0-step=3", analysis.record)
    for other in (analysis.record, path, str(tmp_path), tmp_path / "netsim"):
        pd.testing.assert_frame_equal(find_issues(other).table, report.table, check_dtype=False)
    pd.testing.assert_frame_equal(analysis.find_issues().table, report.table)
    assert analysis.find_issues(["label"], {"label": 1e-6}).issues == ("label",)
    monitor = watching()
    train(tmp_path / "fit", monitor)
    assert monitor.record is not None
    pd.testing.assert_frame_equal(find_issues(monitor).table, find_issues(monitor.record).table)
    assert set(find_issues(monitor).issues) == set(SELF)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_saving_and_reading_again(tmp_path: Path, ending: str) -> None:
    report: IssueReport = find_issues(strings(NAMES))
    path = report.save(str(tmp_path / f"issues.{ending}"))
    table = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    pd.testing.assert_frame_equal(table, report.table, check_dtype=False)
    with pytest.raises(NetsimError, match=r"\.csv or \.parquet"):
        report.save(tmp_path / "issues.xlsx")
    assert report.save(tmp_path / "new" / f"issues.{ending}").is_file()


@pytest.mark.parametrize(("size", "rare"), [(3, 3), (4, 0), (5, 0)])
def test_classes_too_small_for_neighbors_to_speak_are_said(size: int, rare: int) -> None:
    report = find_issues(clear_record(labels=[9] * size + [1] * (45 - size)), ["label"])
    assert [note.split()[0] for note in report.notes] == [str(rare)] * bool(rare)


def test_the_dimension_is_bounded_and_one_where_it_is_not_known() -> None:
    assert find_issues(record_of(np.eye(8), 4), ["outlier"]).scales["dimension"] == 100
    assert find_issues(record_of(np.tile([[0.6, 0.8]], (9, 1)), 4), ["outlier"]).scales["dimension"] == 1
