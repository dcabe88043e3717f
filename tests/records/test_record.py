from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_netsim._checks import NetsimError
from lightning_netsim.records import record as records
from lightning_netsim.records.record import (
    CLASS_COLUMNS,
    SAMPLE_COLUMNS,
    SCHEMA_VERSION,
    Record,
    check_table,
    list_records,
    newest_record,
    prune_records,
    read_record,
    record_directory,
    write_record,
)
from tests.report.made_up import make_record


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip_keeps_tables_and_meta(tmp_path: Path) -> None:
    record = make_record(n=12, k=3, activations=True, directions={"kind": "all", "count": 10})
    record.samples.loc[4, ["soft_count", "neighbor_fraction"]] = np.nan
    path = write_record(tmp_path / "netsim" / "epoch=4-step=225", record)
    back = read_record(path)
    pd.testing.assert_frame_equal(back.samples, record.samples)
    pd.testing.assert_frame_equal(back.neighbors, record.neighbors)
    pd.testing.assert_frame_equal(back.activation_neighbors, record.activation_neighbors)
    assert back.meta == record.meta | {"schema_version": SCHEMA_VERSION}
    assert back.path == path
    assert sorted(contents(path)) == ["activation_neighbors.parquet", "meta.json", "neighbors.parquet", "samples.parquet"]


def class_table(labels: list[object]) -> pd.DataFrame:
    pairs = [(one, other) for one in labels for other in labels]
    columns = {"label": [one for one, _ in pairs], "other_label": [other for _, other in pairs]}
    values = [np.nan if one == other else 0.125 for one, other in pairs]
    return pd.DataFrame({**columns, "similarity": values, "num_samples": 1})


@pytest.mark.parametrize("labels", [[0, 1, 7], ["a", "b"]])
def test_round_trip_keeps_the_classes(tmp_path: Path, labels: list[object]) -> None:
    record = dataclasses.replace(make_record(n=5, k=2), classes=class_table(labels))
    path = write_record(tmp_path / "r", record)
    assert sorted(contents(path)) == ["classes.parquet", "meta.json", "neighbors.parquet", "samples.parquet"]
    back = read_record(path)
    assert back.classes is not None
    assert list(back.classes.columns) == [column.name for column in CLASS_COLUMNS]
    assert back.classes["label"].tolist() == record.classes["label"].tolist()
    np.testing.assert_array_equal(back.classes["similarity"], record.classes["similarity"])
    assert back.classes["num_samples"].dtype == np.int64
    write_record(path, make_record(n=5, k=2))  # The classes of the earlier record go with it.
    assert read_record(path).classes is None


def test_round_trip_without_labels_with_string_ids_and_no_pairs(tmp_path: Path) -> None:
    record = make_record(n=3, k=1, labels=False)
    record.samples["sample_id"] = ["a.png", "b.png", "c.png"]
    empty = pd.DataFrame({"index": [], "rank": [], "neighbor": [], "similarity": []})
    back = read_record(write_record(tmp_path / "r", dataclasses.replace(record, neighbors=empty)))
    assert back.samples["sample_id"].tolist() == ["a.png", "b.png", "c.png"]
    assert "label" not in back.samples
    assert back.activation_neighbors is None
    assert len(back.neighbors) == 0
    assert back.neighbors["index"].dtype == np.int64


def test_meta_becomes_plain_json(tmp_path: Path) -> None:
    odd = {"array": np.arange(2), "number": np.float32(0.5), "tensor": torch.tensor([1, 2]), "path": Path("x"), "none": np.nan}
    record = dataclasses.replace(make_record(n=3, k=1), meta=odd)
    path = write_record(tmp_path / "r", record)
    meta = json.loads((path / "meta.json").read_text())
    assert meta.pop("schema_version") == SCHEMA_VERSION
    assert meta == {"array": [0, 1], "number": 0.5, "tensor": [1, 2], "path": "x", "none": None}


def test_check_table_orders_casts_and_keeps_further_columns() -> None:
    samples = make_record(n=4, k=1).samples.astype({"soft_count": "float32", "index": "int32"})
    samples.insert(0, "hard_count_0.9", [1, 2, 3, 4])
    table = check_table("samples", samples, SAMPLE_COLUMNS)
    present = [column.name for column in SAMPLE_COLUMNS if column.name in samples]
    assert list(table.columns) == [*present, "hard_count_0.9"]
    assert table["soft_count"].dtype == np.float64
    assert table["index"].dtype == np.int64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="soft_count"), "soft_count"),
        (lambda table: table.assign(index=0.5), "integers"),
        (lambda table: table.assign(neighbor_fraction="many"), "real numbers"),
        (lambda table: table.assign(label=[[1], [2], [3], [4]]), "integers, real numbers or strings"),
        (lambda table: table.assign(index=[0, 1, 1, 2]), "1 more than once"),
        (lambda table: table.assign(index=pd.array([0, 1, None, 2], dtype="Int64")), "integers"),
    ],
)
def test_a_table_off_the_schema_is_refused_and_nothing_is_written(tmp_path: Path, change, words: str) -> None:
    record = make_record(n=4, k=1)
    with pytest.raises(NetsimError, match=words):
        write_record(tmp_path / "r", dataclasses.replace(record, samples=change(record.samples)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", ["samples", "neighbors"])
def test_a_failure_while_writing_leaves_the_earlier_record_whole(tmp_path: Path, monkeypatch, table: str) -> None:
    path = write_record(tmp_path / "epoch=0-step=1", make_record(n=4, k=1))
    before = contents(path)
    original = pd.DataFrame.to_parquet

    def fail(self: pd.DataFrame, target: Path, **options: object) -> None:
        original(self, target, **options)
        if Path(target).stem == table:
            Path(target).write_bytes(Path(target).read_bytes()[:100])  # half a table, as after a full disk
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    for place in (path, tmp_path / "epoch=1-step=2"):
        with pytest.raises(OSError, match="No space left"):
            write_record(place, make_record(n=8, k=2))
    assert contents(path) == before
    assert [found.name for found in tmp_path.iterdir()] == ["epoch=0-step=1"]


def test_every_file_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch) -> None:
    flushed: list[int] = []
    original = records._put_in_place
    monkeypatch.setattr(records.os, "fsync", lambda number: flushed.append(len(list(tmp_path.glob("r")))))
    monkeypatch.setattr(records, "_put_in_place", lambda staging, target: flushed.append(-1) or original(staging, target))
    write_record(tmp_path / "r", make_record(n=4, k=1))
    assert flushed == [0, 0, 0, -1]


def test_a_failure_of_the_last_rename_puts_the_earlier_record_back(tmp_path: Path, monkeypatch) -> None:
    path = write_record(tmp_path / "epoch=0-step=1", make_record(n=4, k=1))
    before = contents(path)
    original = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_record(path, make_record(n=8, k=2))
    assert contents(path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_at_any_rename_leaves_a_whole_record(tmp_path: Path, monkeypatch) -> None:
    path = write_record(tmp_path / "epoch=0-step=1", make_record(n=4, k=1))
    monkeypatch.setattr(records, "_put_in_place", lambda staging, target: target.rename(records._beside(target, "previous")))
    write_record(path, make_record(n=8, k=2))  # ends between the two renames
    monkeypatch.undo()
    assert not path.exists()
    assert list_records(tmp_path) == [path]
    assert len(read_record(path).samples) == 4
    write_record(path, make_record(n=8, k=2))
    assert len(read_record(path).samples) == 8
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_rewriting_drops_old_figures_and_keeps_files_of_others(tmp_path: Path) -> None:
    path = write_record(tmp_path / "r", make_record(n=4, k=1, activations=True))
    (path / "counts.png").write_bytes(b"old")
    (path / "notes.txt").write_text("mine")
    write_record(path, make_record(n=5, k=1))
    assert sorted(contents(path)) == ["meta.json", "neighbors.parquet", "notes.txt", "samples.parquet"]
    assert (path / "notes.txt").read_text() == "mine"


def test_a_directory_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(NetsimError, match="a new directory or one of an earlier record"):
        write_record(tmp_path, make_record(n=4, k=1))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_reading_says_in_one_sentence_what_is_wrong(tmp_path: Path) -> None:
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1})
    cases = {
        "which is no directory": lambda path: [file.unlink() for file in path.iterdir()] and path.rmdir(),
        "without meta.json": lambda path: (path / "meta.json").unlink(),
        "is not JSON": lambda path: (path / "meta.json").write_text("{"),
        "has no schema_version": lambda path: (path / "meta.json").write_text("{}"),
        "Update lightning_netsim": lambda path: (path / "meta.json").write_text(newer),
        "neighbors.parquet is missing": lambda path: (path / "neighbors.parquet").unlink(),
        "samples.parquet cannot be read": lambda path: (path / "samples.parquet").write_bytes(b"PAR1"),
    }
    for words, damage in cases.items():
        path = write_record(tmp_path / "r", make_record(n=4, k=1))
        damage(path)
        with pytest.raises(NetsimError, match=words):
            read_record(path)
        for file in path.iterdir() if path.exists() else ():
            file.unlink()


def test_records_are_listed_by_epoch_then_step_as_numbers(tmp_path: Path) -> None:
    record = make_record(n=4, k=1)
    for epoch, step in ((10, 5), (9, 100), (9, 20), (2, 7)):
        write_record(record_directory(tmp_path, epoch, step), record)
    (tmp_path / "epoch=11-step=1").mkdir()  # empty: no record
    write_record(tmp_path / "other", record)
    names = [path.name for path in list_records(tmp_path)]
    assert names == ["epoch=2-step=7", "epoch=9-step=20", "epoch=9-step=100", "epoch=10-step=5"]
    assert list_records(tmp_path / "absent") == []
    assert newest_record(tmp_path).path == tmp_path / "epoch=10-step=5"
    assert newest_record(tmp_path / "other").path == tmp_path / "other"


def test_pruning_removes_records_only(tmp_path: Path) -> None:
    record: Record = make_record(n=4, k=1)
    paths = [write_record(record_directory(tmp_path, epoch, epoch), record) for epoch in range(3)]
    (tmp_path / "epoch=7-step=7").mkdir()
    (tmp_path / "epoch=7-step=7" / "mine.txt").write_text("")
    kept = tmp_path / "epoch=7-step=7" / ".." / paths[1].name  # the same place by another name
    assert prune_records(tmp_path, keep={kept}) == [paths[0], paths[2]]
    assert prune_records(tmp_path / "epoch=7-step=7" / "..", keep={paths[1]}) == []
    assert list_records(tmp_path) == [paths[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-step=1", "epoch=7-step=7"]
