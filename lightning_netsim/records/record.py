"""Keep what one run of the measurement found as a record on disk: two tables and what they were made with.

    <log_dir>/netsim/epoch=E-step=S/{samples.parquet, neighbors.parquet, meta.json}

with `activation_neighbors.parquet` where neighbors under activations were sought too, and `classes.parquet` where labels are
classes. A record appears whole or not at all:
it is written beside its place and renamed into it, and an earlier record in that place stays until then.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lightning_netsim._checks import check_writable, expected

SCHEMA_VERSION = 1

SAMPLES, NEIGHBORS, ACTIVATION_NEIGHBORS, CLASSES = "samples", "neighbors", "activation_neighbors", "classes"
META_FILE = "meta.json"
#: The folder of records inside a run's log directory.
RECORDS = "netsim"
_RECORD_NAME = re.compile(r"epoch=(\d+)-step=(\d+)")
_FIGURE_SUFFIXES = (".png", ".html")


@dataclass(frozen=True)
class Column:
    """One column of a table: "integer" is int64, "real" is float64, "value" is either of them or a string."""

    name: str
    kind: Literal["integer", "real", "value"]
    required: bool = True


SAMPLE_COLUMNS = (
    Column("sample_id", "value"),
    Column("index", "integer"),
    Column("dataloader", "integer"),
    Column("label", "value", required=False),
    Column("prediction", "value", required=False),
    Column("margin", "real", required=False),
    Column("soft_count", "real"),
    Column("neighbor_fraction", "real"),
    Column("same_class_fraction", "real", required=False),
    Column("same_class_similarity", "real", required=False),
    Column("other_class_similarity", "real", required=False),
    Column("gradient_norm", "real"),
    Column("rank", "integer"),
)
NEIGHBOR_COLUMNS = (
    Column("index", "integer"),
    Column("rank", "integer"),
    Column("neighbor", "integer"),
    Column("similarity", "real"),
    Column("neighbor_label", "value", required=False),
)
CLASS_COLUMNS = (
    Column("label", "value"),
    Column("other_label", "value"),
    Column("similarity", "real"),
    Column("num_samples", "integer"),
)
_COLUMNS = {
    SAMPLES: SAMPLE_COLUMNS,
    NEIGHBORS: NEIGHBOR_COLUMNS,
    ACTIVATION_NEIGHBORS: NEIGHBOR_COLUMNS,
    CLASSES: CLASS_COLUMNS,
}
_REQUIRED = (SAMPLES, NEIGHBORS)


@dataclass(frozen=True, eq=False)
class Record:
    """What one run of the measurement found.

    Attributes:
        samples: one row for each query sample, columns `SAMPLE_COLUMNS`; `soft_count` is NaN where a sample was left out.
        neighbors: one row for each pair, columns `NEIGHBOR_COLUMNS`: the query's `index`, `rank` 1 to k, the `neighbor`'s
            index in the reference set and their `similarity` in [-1, 1]. `neighbor_label` is for a reference set whose
            labels are not in `samples`.
        meta: what the tables were made with (versions, epoch, directions, recall, ...).
        activation_neighbors: the same as `neighbors`, under the similarity of activations.
        path: the directory that the record was read from.
        classes: one row for each ordered pair of classes of the reference set, columns `CLASS_COLUMNS`: the mean `similarity`
            of their samples (within a class, of different ones), and `num_samples` of `label`.
    """

    samples: pd.DataFrame
    neighbors: pd.DataFrame
    meta: dict[str, Any] = field(default_factory=dict)
    activation_neighbors: pd.DataFrame | None = None
    path: Path | None = None
    classes: pd.DataFrame | None = None


def check_table(name: str, table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """Return `table` with the dtypes of `columns`, which come first, in their order; further columns are kept.

    Raises:
        NetsimError: if a required column is missing or holds values that its kind does not allow.

    >>> frame = pd.DataFrame({"similarity": [1], "rank": [1], "neighbor": [7], "index": [3]})
    >>> list(check_table("neighbors", frame, NEIGHBOR_COLUMNS).columns)
    ['index', 'rank', 'neighbor', 'similarity']
    """
    missing = [column.name for column in columns if column.required and column.name not in table]
    if missing:
        raise expected(name, f"a table with the columns {', '.join(missing)}", "columns " + ", ".join(map(str, table.columns)))
    present = {column.name: column for column in columns if column.name in table}
    rest = [str(column) for column in table.columns if column not in present]
    cast = {key: _cast(f"{name}[{key!r}]", table[key], column.kind) for key, column in present.items()}
    cast.update({key: table[key] for key in rest})
    return pd.DataFrame(cast).reset_index(drop=True)


def _cast(name: str, values: pd.Series, kind: str) -> pd.Series:
    """Return `values` as int64, float64 or (only for the kind "value") strings."""
    if values.empty:
        return values.astype({"integer": "int64", "real": "float64", "value": "str"}[kind])
    numeric = pd.api.types.is_numeric_dtype(values.dtype)
    whole = pd.api.types.is_integer_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype)
    if whole and kind != "real" and not values.isna().any():
        return values.astype("int64")
    if numeric and kind in ("real", "value"):
        return values.astype("float64")
    if kind == "value" and all(isinstance(value, str) for value in values):
        return values.astype("str")
    wanted = {"integer": "integers", "real": "real numbers", "value": "integers, real numbers or strings"}[kind]
    raise expected(name, wanted, f"dtype {values.dtype}")


def record_directory(run_dir: str | os.PathLike[str], epoch: int, step: int) -> Path:
    """Return the directory of a record in the run's directory, which `list_records` finds again.

    >>> record_directory("netsim", epoch=3, step=120).name
    'epoch=3-step=120'
    """
    return Path(run_dir) / f"epoch={epoch}-step={step}"


def write_record(directory: str | os.PathLike[str], record: Record) -> Path:
    """Write `record` as `directory`, whole or not at all, in the place of an earlier record there.

    Files in the directory that belong to no record are kept; figures of the earlier record go with it.

    Args:
        directory: where to write, usually `record_directory(run_dir, epoch, step)`; parents are made.
        record: its `path` is ignored; `schema_version` is added to its `meta`, and non-finite numbers become null.

    Returns:
        `directory` as a path.

    Raises:
        NetsimError: if a table is not of the schema, or `directory` cannot be written or holds something else.
    """
    target = Path(directory)
    tables = {
        name: check_table(name, getattr(record, name), columns)
        for name, columns in _COLUMNS.items()
        if name in _REQUIRED or getattr(record, name) is not None
    }
    repeated = tables[SAMPLES]["index"][tables[SAMPLES]["index"].duplicated()]
    if len(repeated):
        raise expected("samples['index']", "different for each sample", f"{int(repeated.iloc[0])} more than once")
    meta = json.dumps(_plain({**record.meta, "schema_version": SCHEMA_VERSION}), indent=2, allow_nan=False)
    if target.exists() and not _is_record(target) and any(not _is_ours(path) for path in target.iterdir()):
        raise expected("directory", "a new directory or one of an earlier record", f"{str(target)!r} with other files")
    check_writable("directory", target.parent)
    staging = _beside(target, "writing")
    try:
        _remove(staging)
        staging.mkdir()
        for name, table in tables.items():
            table.to_parquet(staging / f"{name}.parquet", index=False)
        (staging / META_FILE).write_text(meta + "\n", encoding="utf-8")
        # The operating system writes the files to the disk, so that the rename cannot come before the contents.
        for path in staging.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _put_in_place(staging, target)
    finally:
        _remove(staging)
    return target


def _plain(value: Any) -> Any:
    """Return `value` in JSON's own types: arrays become lists, non-finite numbers None, all else its string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # an array, a number of numpy, a tensor
        return _plain(value.tolist())
    return str(value)


def _put_in_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; what was there stays whole beside it until that is done."""
    previous = _beside(target, "previous")
    if target.exists():
        _remove(previous)
        target.rename(previous)
    try:
        staging.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    if previous.exists():
        for path in previous.iterdir():
            if not _is_ours(path):
                path.rename(target / path.name)
        _remove(previous)


def read_record(directory: str | os.PathLike[str]) -> Record:
    """Read the record that `write_record` wrote.

    Raises:
        NetsimError: if `directory` is no record, is damaged, or was written by a newer version of this package.
    """
    place = Path(directory)
    source = place if place.exists() else _beside(place, "previous")
    meta = _read_meta(source, place)
    tables = {}
    for name, columns in _COLUMNS.items():
        file = source / f"{name}.parquet"
        if name not in _REQUIRED and not file.exists():
            continue
        try:
            table = pd.read_parquet(file)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise expected("directory", "a whole record", f"{str(place)!r} whose {file.name} {reason}") from error
        tables[name] = check_table(name, table, columns)
    return Record(meta=meta, path=place, **tables)


def _read_meta(source: Path, place: Path) -> dict[str, Any]:
    """Return what `meta.json` says, if its schema is one that this version can read."""
    wanted = "a record (a directory with samples.parquet, neighbors.parquet and meta.json)"
    if not _is_record(source):
        got = f"{str(place)!r} without {META_FILE}" if place.is_dir() else f"{str(place)!r}, which is no directory"
        raise expected("directory", wanted, got)
    try:
        meta = json.loads((source / META_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise expected("directory", wanted, f"{str(place)!r} whose {META_FILE} is not JSON ({error})") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise expected("directory", wanted, f"{str(place)!r} whose {META_FILE} has no schema_version")
    if version > SCHEMA_VERSION:
        wanted = f"a record of schema version {SCHEMA_VERSION} or older"
        raise expected("directory", wanted, f"{str(place)!r} of version {version}", "Update lightning_netsim.")
    return dict(meta)


def list_records(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the records of a run, the directories named `epoch=E-step=S`, sorted by (E, S).

    Args:
        run_dir: the run's `netsim` directory; one that does not exist has no records.
    """
    found: dict[Path, tuple[int, int]] = {}
    root = Path(run_dir)
    for path in root.iterdir() if root.is_dir() else ():
        place = root / path.name.removeprefix(".").removesuffix(".previous")
        match = _RECORD_NAME.fullmatch(place.name)
        if match and path in (place, _beside(place, "previous")) and _is_record(path):
            found[place] = (int(match[1]), int(match[2]))
    return sorted(found, key=lambda place: found[place])


def newest_record(path: str | os.PathLike[str]) -> Record:
    """Read the newest record of a run's log directory, or the record that a directory is.

    Raises:
        NetsimError: if there is none, or if it was written by a newer version.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise expected("path", "a directory of a run or a record", f"{str(path)!r}, which does not exist")
    for folder in (directory, directory / RECORDS):
        records = list_records(folder)
        if records:
            return read_record(records[-1])
    return read_record(directory)


def prune_records(run_dir: str | os.PathLike[str], keep: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Remove the records of a run that are not in `keep`, and return the places of those removed.

    Args:
        run_dir: the run's `netsim` directory.
        keep: places of the records to keep; nothing but records is ever removed.
    """
    kept = {Path(path).resolve() for path in keep}
    removed = [place for place in list_records(run_dir) if place.resolve() not in kept]
    for place in removed:
        gone = _beside(place, "removing")
        _remove(gone)
        if place.exists():
            place.rename(gone)
        _remove(gone)
        _remove(_beside(place, "previous"))
    return removed


def _beside(target: Path, state: str) -> Path:
    """Return the hidden sibling of `target` for one state of its replacement."""
    return target.with_name(f".{target.name}.{state}")


def _is_record(path: Path) -> bool:
    return (path / META_FILE).is_file()


def _is_ours(path: Path) -> bool:
    """Return whether a file in a record's directory is part of the record: a table, meta.json or a figure."""
    tables = {f"{name}.parquet" for name in _COLUMNS}
    return path.name == META_FILE or path.name in tables or path.suffix in _FIGURE_SUFFIXES


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
