"""What was decided in a review is applied to the data set, and nothing else."""

from __future__ import annotations

import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ChainDataset, DataLoader, Subset, TensorDataset, WeightedRandomSampler

from lightning_netsim import apply_review, find_issues
from lightning_netsim._checks import NetsimError
from lightning_netsim.analysis.review import review, review_table
from lightning_netsim.analysis.reviewed_dataset import ACTIONS, ReviewedDataset
from lightning_netsim.data.batches import LABEL_KEYS
from lightning_netsim.records.record import write_record
from tests.issue_oracles import flawed, units

Labeled = namedtuple("Labeled", "x y name")
NAMES = ["ape", "None", "007"]


def table_of(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns)


def one(action: str, **columns: Any) -> pd.DataFrame:
    """Return the review of sample 1 only."""
    return table_of(sample_id=[1], action=[action], **{name: [value] for name, value in columns.items()})


def pairs(labels: Any) -> list[tuple[int, Any]]:
    return list(enumerate(labels))


@pytest.mark.parametrize("kind", ["int", "negative", "large", "string", "numerals", "float", "none"])
def test_what_was_written_can_be_applied(tmp_path: Path, kind: str) -> None:
    classes = [int(c + (row % 9 == 4)) % 3 for row, c in enumerate(units(45)[1])]
    labels: Any = {
        "int": classes,
        "negative": [-3 * c for c in classes],
        "large": [2**53 + 1 + 2 * c for c in classes],
        "string": [NAMES[c] for c in classes],
        "numerals": [f"{c}" for c in classes],
        "float": [c + units(45)[0][row, 0] / 10 for row, c in enumerate(classes)],
        "none": None,
    }[kind]
    names = [f"{row:05d}" for row in range(45)]
    record = flawed(labels=labels, ids=names)
    path = review(write_record(tmp_path / "r", record))
    given = labels or [0] * 45
    reviewed = apply_review(pairs(given), path, names)
    table = find_issues(record).table
    dropped = [12, 30]
    flagged = [row for row in range(45) if labels is not None and table["is_label_issue"][row] and row not in dropped]
    assert bool(flagged) == (labels is not None)
    assert reviewed.positions == [row for row in range(45) if row not in dropped]
    wanted = {row: table["suggested_label"][row] for row in flagged}
    assert reviewed.labels == pytest.approx(wanted) if kind == "float" else reviewed.labels == wanted
    assert all(type(label) is type(given[0]) for label in reviewed.labels.values())
    assert [reviewed[place] for place in range(43)] == [
        (row, reviewed.labels.get(row, given[row])) for row in reviewed.positions
    ]


def test_applying_what_pandas_read_and_wrote_again(tmp_path: Path) -> None:
    record = flawed()
    path, data = review(write_record(tmp_path / "r", record)), pairs(record.samples["label"].tolist())
    first = apply_review(data, path)
    pd.read_csv(path).to_csv(tmp_path / "again.csv", index=False)
    for other in (tmp_path / "again.csv", str(path), pd.read_csv(path), review_table(find_issues(record))):
        reviewed = apply_review(data, other)
        assert (reviewed.positions, reviewed.labels) == (first.positions, first.labels)
    with pytest.raises(NetsimError, match="Is it the data set that was measured"):
        apply_review(pairs([label + 1 for _, label in data]), path)


def test_the_four_actions() -> None:
    table = table_of(
        sample_id=[4, 0, 2, 3],
        action=["Drop ", "keep", "relabel", " REWEIGHT"],
        suggested_label=[9, 9, 7, 9],
        weight=[5.0, 5.0, 5.0, 0.25],
    )
    data = TensorDataset(torch.arange(6.0), torch.arange(6))
    reviewed = apply_review(data, table)
    assert reviewed.positions == [0, 1, 2, 3, 5]
    assert [(float(x), int(y)) for x, y in [reviewed[i] for i in range(5)]] == [(0, 0), (1, 1), (2, 7), (3, 3), (5, 5)]
    assert reviewed.weights.tolist() == [1, 1, 1, 0.25, 1]
    assert reviewed.weights.dtype == torch.float64
    assert repr(reviewed) == "ReviewedDataset(5 samples: 1 dropped, 1 relabeled, 1 reweighted)"
    assert reviewed.dataset is data
    assert data.tensors[1].tolist() == list(range(6))
    assert float(reviewed[-1][0]) == 5
    with pytest.raises(IndexError):
        reviewed[5]


def test_the_data_set_and_the_table_are_left_alone() -> None:
    samples = [{"x": i, "label": i % 2} for i in range(4)]
    table = one("relabel", suggested_label=0)
    before = table.copy()
    reviewed = apply_review(samples, table)
    assert reviewed[1] == {"x": 1, "label": 0}
    assert samples == [{"x": i, "label": i % 2} for i in range(4)]
    lists = [[0, 1], [1, 1, "more"]]
    assert apply_review(lists, table)[1] == [1, 0, "more"]
    assert lists == [[0, 1], [1, 1, "more"]]
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    "sample",
    [(5, 1), (5, 1, "more"), [5, 1], Labeled(5, 1, "n"), *({"x": 5, key: 1} for key in LABEL_KEYS)],
    ids=lambda sample: f"{type(sample).__name__} {list(sample)[1]}",
)
def test_samples_of_any_form_keep_it(sample: Any) -> None:
    found = apply_review([sample, sample], one("relabel", suggested_label=4))[1]
    assert type(found) is type(sample)
    assert str(found) == str(sample).replace("1", "4", 1)


@pytest.mark.parametrize("suggested", ["300", "-1", "2.5"])
@pytest.mark.parametrize("label", [torch.tensor(1, dtype=torch.uint8), np.uint8(1), True], ids=repr)
def test_a_new_label_that_the_type_does_not_hold(label: Any, suggested: str) -> None:
    with pytest.raises(NetsimError, match=r"`review`.*labels like"):
        apply_review([(0, label)] * 2, one("relabel", suggested_label=suggested))


LABELS = [1, True, 1.5, "b", np.int64(1), np.float32(1.5), np.float64(1.5), np.array(1), np.array([1]), np.array(1.5, "f4")]
TENSORS = [torch.tensor(1), torch.tensor([1]), torch.tensor(1.5), torch.tensor([[1.0]]), torch.tensor(1, dtype=torch.uint8)]


@pytest.mark.parametrize("label", [*LABELS, *TENSORS], ids=repr)
def test_a_new_label_has_the_type_of_the_old_one(label: Any) -> None:
    found = apply_review([(0, label)] * 2, one("relabel", suggested_label="0"))[1][1]
    assert type(found) is type(label) or (isinstance(label, np.ndarray) and found.dtype == label.dtype)
    assert getattr(found, "dtype", None) == getattr(label, "dtype", None)
    assert getattr(found, "shape", ()) == getattr(label, "shape", ())
    assert found == ("0" if label == "b" else 0)
    if label == 1.5:
        assert apply_review([(0, label)] * 2, one("relabel", suggested_label="0.25"))[1][1] == 0.25


ONE_HOT = [torch.tensor([0.0, 1.0]), np.array([0, 1]), torch.zeros(0), None, [1], {"box": 1}, object()]


@pytest.mark.parametrize("label", ONE_HOT, ids=lambda label: type(label).__name__)
def test_a_label_that_is_no_single_number_or_name_is_not_changed(label: Any) -> None:
    with pytest.raises(NetsimError, match=r"`dataset`.*label"):
        apply_review([(0, label)] * 2, one("relabel", suggested_label=0))


NO_LABEL = "`dataset` to be one whose samples are"
BAD: list[tuple[Any, pd.DataFrame, str]] = [
    (pairs("ab"), one("remove"), "action is one of keep, drop, relabel, reweight, but got 'remove' for 1"),
    (pairs("ab"), one("relabel"), "suggested_label for each relabel, but got none for 1"),
    (pairs("ab"), one("relabel", suggested_label="  "), "suggested_label for each relabel"),
    (pairs([0, 1]), one("relabel", suggested_label="cat"), "labels like 1, that of sample 1, but got 'cat'"),
    (pairs([0, 1]), one("relabel", suggested_label=0.5), "labels like 1, that of sample 1, but got "),
    (pairs([0, 1]), one("relabel", suggested_label="inf"), "`review`.*'inf'"),
    (pairs([0, 1]), one("reweight", weight="heavy"), "weight.*'heavy' for"),
    (pairs([0, 1]), one("reweight", weight=-1), "weight of at least 0"),
    (pairs([0, 1]), one("reweight", weight="inf"), "weight of at least 0"),
    (pairs([0]), one("drop"), "the sample_id '1', which it has not. Give the `ids`"),
    (pairs([0, 1]), table_of(sample_id=[0, 7, 8], action=["keep"] * 3), "'7' and 1 more"),
    (pairs([0, 1]), table_of(sample_id=[0, "0"], action=["keep"] * 2), "one row for each sample.*'0' more than once"),
    (pairs([0, 1]), table_of(id=[0], action=["keep"]), "one without sample_id. Were its columns renamed"),
    (pairs([0, 1]), table_of(sample_id=[0]), "one without action"),
    ([torch.zeros(2)] * 2, one("relabel", suggested_label=0), NO_LABEL),
    ([(0,)] * 2, one("relabel", suggested_label=0), NO_LABEL),
    ([{"x": 0, "class": 1}] * 2, one("relabel", suggested_label=0), NO_LABEL),
    (iter(pairs([0, 1])), one("drop"), "map-style data set"),
    (ChainDataset([]), one("drop"), "map-style data set"),
]


@pytest.mark.parametrize(("dataset", "table", "words"), BAD)
def test_nonsense_is_one_sentence(dataset: Any, table: pd.DataFrame, words: str, tmp_path: Path) -> None:
    with pytest.raises(NetsimError, match=words):
        apply_review(dataset, table)
    table.to_csv(tmp_path / "edited.csv", index=False)
    # Whatever pandas makes of the numbers, the fault is the same.
    with pytest.raises(NetsimError, match=words.partition(", but got")[0]):
        apply_review(dataset, tmp_path / "edited.csv")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\xff\xfe\x00" * 9)
    for other in (tmp_path / "absent.csv", tmp_path, tmp_path / "empty.csv", tmp_path / "picture.csv", None, 5):
        with pytest.raises(NetsimError, match=r"`review`.*`netsim review` wrote"):
            apply_review(pairs([0, 1]), other)  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_what_a_spreadsheet_program_makes_of_it(mark: str, tmp_path: Path) -> None:
    rows = [
        ["Sample_id", " action", "suggested_label", "weight"],
        ["1.0", "Relabel", "0", ""],
        ["2", "reweight", "", "0.5"],
        [""] * 4,
    ]
    text = "\n".join(mark.join(row) for row in rows)
    (tmp_path / "sheet.csv").write_text(text.replace("0.5", "0.5" if mark == "," else "0,5"), encoding="utf-8-sig")
    reviewed = apply_review(pairs([0, 1, 1]), tmp_path / "sheet.csv")
    assert (reviewed.labels, reviewed.weights.tolist()) == ({1: 0}, [1, 1, 0.5])


@pytest.mark.parametrize("sample_id", [["b", "a"], [7, 3], ["007", "03"], ["NA", "nan"], ["1e5", "True"]])
def test_samples_are_found_by_their_ids(sample_id: list[Any], tmp_path: Path) -> None:
    last, first = sample_id
    ids = [first, "other", last]
    table = table_of(sample_id=sample_id, action=["drop", "relabel"], suggested_label=["9", "8"], weight=[1, 1])
    table.to_csv(tmp_path / "r.csv", index=False)
    for either in (table, tmp_path / "r.csv"):
        reviewed = apply_review(pairs([0, 1, 2]), either, iter(ids))
        assert list(reviewed) == [(0, 8), (1, 1)]
        assert reviewed.ids == [first, "other"]


def test_ids_may_be_numbers_of_any_type() -> None:
    for ids in ([10, 20], torch.tensor([10, 20]), np.array([10, 20]), ["10", "20"], [10.0, 20.0], range(10, 30, 10)):
        for name in (20, "20", 20.0, np.int64(20)):
            assert list(apply_review(pairs("ab"), table_of(sample_id=[name], action=["drop"]), ids)) == [(0, "a")]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a"], "`ids` to be 2, one for each sample of the data set, but got 1"),
        (["a", "a"], "`ids` to be different for each sample, but got 'a' more than once"),
        ([1, "1"], "`ids`.*'1' more than once"),
        (["a", "b"], "'1', which it has not. Is it the data set that was measured"),
        (5, "`ids`"),
        ("ab", "`ids`"),
    ],
)
def test_ids_that_do_not_fit(ids: Any, words: str) -> None:
    with pytest.raises(NetsimError, match=words):
        apply_review(pairs([0, 1]), one("drop"), ids)


def test_a_loader_draws_by_the_weights() -> None:
    table = table_of(sample_id=[1, 2, 5], action=["reweight", "drop", "relabel"], suggested_label=[9] * 3, weight=[0, 1, 1])
    reviewed = apply_review(Subset(TensorDataset(torch.arange(20), torch.zeros(20).long()), range(10)), table)
    [(x, y)] = DataLoader(reviewed, batch_size=99, num_workers=0)
    assert (x.tolist(), y.tolist()) == ([0, 1, *range(3, 10)], [0, 0, 0, 0, 9, 0, 0, 0, 0])
    sampler = WeightedRandomSampler(reviewed.weights, 400)  # type: ignore[arg-type]
    drawn = torch.cat([batch[0] for batch in DataLoader(reviewed, 50, sampler=sampler)]).tolist()
    assert set(drawn) == {0, *range(3, 10)}
    again: ReviewedDataset = pickle.loads(pickle.dumps(reviewed))
    assert [int(y) for _, y in again] == y.tolist()


ROW = st.tuples(st.sampled_from(ACTIONS), st.integers(-3, 3), st.floats(0, 10))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.data())
def test_any_review_against_a_loop(number: int, data: st.DataObject) -> None:
    rows = data.draw(st.dictionaries(st.integers(0, number - 1), ROW))
    places = data.draw(st.permutations(sorted(rows)))
    columns = {"sample_id": places, "action": [rows[i][0] for i in places]}
    columns |= {"suggested_label": [rows[i][1] for i in places], "weight": [rows[i][2] for i in places]}
    reviewed = apply_review(pairs([5] * number), pd.DataFrame(columns))
    samples, weights = [], []
    for i in range(number):
        action, label, weight = rows.get(i, ("keep", 0, 0.0))
        if action != "drop":
            samples.append((i, label if action == "relabel" else 5))
            weights.append(weight if action == "reweight" else 1.0)
    assert [reviewed[i] for i in range(len(reviewed))] == samples
    assert reviewed.weights.tolist() == weights
