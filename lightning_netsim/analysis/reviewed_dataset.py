"""Apply a review to the data set that was measured: drop, relabel and reweight samples."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_netsim._checks import NetsimError, expected
from lightning_netsim.data.batches import LABEL_KEYS

ACTIONS = ("keep", "drop", "relabel", "reweight")
_COLUMNS = ("sample_id", "action", "suggested_label", "weight")


class ReviewedDataset(Dataset[Any]):
    """A data set after a review: without the samples that were dropped, and with the labels that were changed.

    Made by `apply_review`.

    Attributes:
        dataset: the data set as it was.
        positions: which of its samples are left, ascending.
        labels: the new labels, by position in `dataset`.
        ids: the ids of the samples that are left; None where they have none but their position.
        weights: shape (N,), float64, the weight of each sample that is left, for `torch.utils.data.WeightedRandomSampler`; 1
            where the review says nothing.
    """

    def __init__(
        self,
        dataset: Any,
        positions: Sequence[int],
        labels: Mapping[int, Any],
        weights: Tensor,
        ids: Sequence[Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.positions = list(positions)
        self.labels = dict(labels)
        self.weights = weights
        self.ids = None if ids is None else list(ids)

    @property
    def classes(self) -> Any:
        """Return the names of the classes, if the data set has them."""
        return getattr(self.dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        position = self.positions[index]
        sample = self.dataset[position]
        if position not in self.labels:
            return sample
        if isinstance(sample, Mapping):
            return {**sample, _label_key(sample): self.labels[position]}
        parts = [sample[0], self.labels[position], *sample[2:]]
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)

    def __repr__(self) -> str:
        dropped = len(self.dataset) - len(self.positions)
        changed = int((self.weights != 1).sum())
        return f"ReviewedDataset({len(self)} samples: {dropped} dropped, {len(self.labels)} relabeled, {changed} reweighted)"


def apply_review(
    dataset: Any, review: str | os.PathLike[str] | pd.DataFrame, ids: Iterable[Any] | None = None
) -> ReviewedDataset:
    """Drop, relabel or reweight samples of a data set as a review says; samples that it does not name are kept.

    Args:
        dataset: a map-style data set, of which the reviewed samples were a part; it is not changed.
        review: the CSV file that `review` wrote, edited or not, or such a table. Of its columns, `sample_id` and `action`
            ("keep", "drop", "relabel", "reweight") are read, `suggested_label` where the action is relabel, and `weight`, at
            least 0, where it is reweight.
        ids: the id of each sample of the data set, in its order, where `sample_id` is not its position: what the batches or
            `similarity_step` named it by when it was measured.

    Returns:
        a data set with the same samples, but those.

    Raises:
        ValueError: for a missing column, an unknown action, an id that the data set does not have or that comes twice, a
            `label` that is not that of the sample, a new label that is missing or of another type, or a weight that is none.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> table = {"sample_id": [0, 2], "action": ["drop", "relabel"], "suggested_label": [1, 0], "weight": [1.0, 1.0]}
        >>> reviewed = apply_review(data, pd.DataFrame(table))
        >>> len(reviewed), int(reviewed[1][1])
        (2, 0)
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise expected("dataset", "a map-style data set, with a length and an index", type(dataset).__name__)
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Iterable)):
        raise expected("ids", "the ids of the samples in their order", repr(ids))
    names = None if ids is None else list(ids)
    table = _read(review)
    places = _places(dataset, names, table["sample_id"].tolist())
    decisions = {place: _decide(row) for place, row in zip(places, table.to_dict("records"), strict=True)}
    # Transforms of the data set may draw random numbers.
    with isolate_rng():
        changed = {place: action for place, (action, _) in decisions.items() if action != "keep"}
        given = {place: _label_of(dataset[place], action == "relabel") for place, action in changed.items()}
    if "label" in table:
        _check_labels(dict(zip(places, table["label"], strict=True)), given)
    labels = {place: _like(value, given[place], place) for place, (action, value) in decisions.items() if action == "relabel"}
    positions = [place for place in range(len(dataset)) if changed.get(place) != "drop"]
    weights = torch.ones(len(positions), dtype=torch.float64)
    for row, place in enumerate(positions):
        if changed.get(place) == "reweight":
            weights[row] = decisions[place][1]
    left = None if names is None else [names[place] for place in positions]
    return ReviewedDataset(dataset, positions, labels, weights, left)


def _read(review: str | os.PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Return the table of a review, checked as far as that needs no data set."""
    wanted = "a CSV file that `netsim review` wrote"
    if isinstance(review, pd.DataFrame):
        table = review
    elif not isinstance(review, (str, os.PathLike)) or not Path(review).is_file():
        raise expected("review", wanted, f"{review!r}, which is no file")
    else:
        try:
            # Also what a spreadsheet program wrote: with semicolons or tabs, and empty rows.
            with Path(review).open(encoding="utf-8-sig") as file:
                head = file.readline()
            mark = max(",;\t", key=head.count)
            # Names such as 00012 or None are to stay what they are.
            table = pd.read_csv(review, sep=mark, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
            table = table[(table != "").any(axis=1)]
        except (ValueError, OSError) as error:  # pandas' errors of parsing are ValueErrors
            raise expected("review", wanted, f"{str(review)!r} ({error})") from error
    table = table.rename(columns=lambda name: str(name).strip().lower())
    missing = [name for name in _COLUMNS[:2] if name not in table]
    if missing:
        wanted = f"a table with the columns {', '.join(_COLUMNS)}"
        raise expected("review", wanted, f"one without {', '.join(missing)}", "Were its columns renamed?")
    return table


def _places(dataset: Any, ids: list[Any] | None, named: list[Any]) -> list[int]:
    """Return the positions of the samples that a review names."""
    known = [_plain(name) for name in (range(len(dataset)) if ids is None else ids)]
    if len(known) != len(dataset):
        raise expected("ids", f"{len(dataset)}, one for each sample of the data set", f"{len(known)}")
    places = {name: place for place, name in enumerate(known)}
    if len(places) != len(known):
        [(twice, _)] = Counter(known).most_common(1)
        raise expected("ids", "different for each sample", f"{twice!r} more than once")
    named = [_plain(name) for name in named]
    unknown = [name for name in named if name not in places]
    if unknown:
        remedy = (
            "Give the `ids` of its samples, or, where several loaders were measured, a ConcatDataset of their data sets."
            if ids is None
            else "Is it the data set that was measured, and did a spreadsheet program leave the ids as they were?"
        )
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        got = f"the sample_id {unknown[0]!r}{more}, which it has not"
        raise expected("review", "about samples of the data set", got, remedy)
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise expected("review", "one row for each sample", f"the sample_id {twice[0]!r} more than once")
    return [places[name] for name in named]


def _decide(row: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the action that a row of a review says, and its new label or weight."""
    name, action = row["sample_id"], str(row["action"]).strip().lower()
    if action not in ACTIONS:
        raise expected("review", f"a table whose action is one of {', '.join(ACTIONS)}", f"{row['action']!r} for {name!r}")
    if action == "relabel" and _is_missing(row.get("suggested_label")):
        raise expected("review", "a table with a suggested_label for each relabel", f"none for {name!r}")
    if action != "reweight":
        return action, row.get("suggested_label")
    weight = row.get("weight")
    try:
        number = float(str(weight).replace(",", "."))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise expected("review", "a table with a weight of at least 0 for each reweight", f"{weight!r} for {name!r}")
    return action, number


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value)) or str(value).strip() == ""


def _plain(name: Any) -> Any:
    """Return an id so that 7, 7.0, "7" and a tensor of 7 are one."""
    name = name.item() if hasattr(name, "item") else name
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    text = str(name)
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def _label_of(sample: Any, required: bool) -> Any:
    """Return the label of a sample: the second of a tuple, or what stands under a usual name.

    Raises:
        ValueError: if there is none, and it is required.
    """
    if isinstance(sample, Mapping) and any(key in sample for key in LABEL_KEYS):
        return sample[_label_key(sample)]
    if isinstance(sample, (tuple, list)) and len(sample) > 1:
        return sample[1]
    if not required:
        return None
    wanted = f"one whose samples are (input, label, ...) or mappings with one of {', '.join(LABEL_KEYS)}, to relabel them"
    raise expected("dataset", wanted, type(sample).__name__)


def _label_key(sample: Mapping[str, Any]) -> str:
    return next(key for key in LABEL_KEYS if key in sample)


def _like(label: Any, given: Any, place: int) -> Any:
    """Return a new label in the type of the old one.

    Raises:
        ValueError: if that cannot be.
    """
    if isinstance(given, str):
        return str(label)
    single = given.item() if hasattr(given, "item") and math.prod(getattr(given, "shape", ())) == 1 else given
    if not isinstance(single, (int, float)):
        wanted = "one whose labels are numbers or names, to relabel its samples"
        raise expected("dataset", wanted, f"a {type(given).__name__} for sample {place}")
    try:
        value = _number(str(label).strip(), type(single))
        if isinstance(given, Tensor):
            made = torch.full_like(given, value)
            if made.item() != value and isinstance(value, int):  # An unsigned label goes round.
                raise OverflowError(label)
            return made
        return np.full_like(given, value)[()] if isinstance(given, (np.generic, np.ndarray)) else value
    except (KeyError, ValueError, OverflowError, RuntimeError) as error:
        wanted = f"a table with labels like {single!r}, that of sample {place}"
        raise expected("review", wanted, repr(label)) from error


def _number(text: str, kind: type) -> int | float | bool:
    """Return what a text says, as a number of a kind: "5" and "5.0" are the whole number 5.

    Raises:
        ValueError: if it is none; KeyError if it is no truth value.
    """
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower().removesuffix(".0")]
    if kind is float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def _check_labels(named: Mapping[int, Any], given: Mapping[int, Any]) -> None:
    """Refuse a review of another data set: its labels are others.

    Args:
        named: the label of each sample in the review, by position.
        given: that in the data set, of those that are to change; None where it has none.

    Raises:
        ValueError: naming the first sample whose label differs.
    """
    for place, label in given.items():
        if label is None or _is_missing(named[place]) or _is_same(named[place], label, place):
            continue
        got = f"the label {named[place]!r} for sample {place}, which has {label!r}"
        raise expected("review", "of this data set", got, "Is it the data set that was measured, and unchanged since?")


def _is_same(named: Any, given: Any, place: int) -> bool:
    """Return whether a label as text is that of a sample; a spreadsheet program shortens numbers."""
    if isinstance(given, str):
        return given == str(named)
    try:
        return math.isclose(float(given), float(_like(named, given, place)), rel_tol=1e-6)
    except (NetsimError, RuntimeError, TypeError, ValueError):
        return False
