"""Score the samples of a record for what may be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lightning_netsim._checks import expected
from lightning_netsim.data.labels import label_kind
from lightning_netsim.functional import expected_neighbors, label_quality, label_votes, neighbor_dimension, neighbor_radius
from lightning_netsim.functional.label_quality import rank_weights
from lightning_netsim.records.record import Record
from lightning_netsim.records.view import RecordView

Array = npt.NDArray[Any]

ISSUES = ("label", "near_duplicate", "outlier", "hard", "leak")
# Similarities are computed in float32, by sums that round several times.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)
# With two neighbors, a dimension is read off one ratio of distances.
_FEWEST_NEIGHBORS = 3
# Where the distances of most samples are equal, nothing but a copy is to stand out.
_MOST_DIMENSIONS = 100.0
#: A class with fewer samples has too few for its labels to be judged by neighbors.
RARE = 4
#: A score below this is an issue; `find_issues` says what the scores are relative to.
THRESHOLDS = {"label": 1 / 2, "value_label": 1 / 7, "near_duplicate": 1e-3, "outlier": 1 / 20, "hard": 1 / 6, "leak": 1e-3}


class IssueFinder:
    """The columns of a report, issue by issue, from the tables of a record; `find_issues` says what they hold.

    Args:
        record: the tables.
        levels: a score below this is an issue; those of `THRESHOLDS`.

    Attributes:
        columns: those found so far.
        scales: what the scores are relative to: medians, and the dimension of the data set.
        skipped: why some issues cannot be looked for.
        notes: remarks for the user.
    """

    def __init__(self, record: Record, levels: Mapping[str, float]) -> None:
        self.levels = levels
        self.samples = record.samples.reset_index(drop=True)
        self.view = RecordView(record)
        self.compares_with_itself = self.view.reference == "self"
        self.kernel = _Neighbors(record.neighbors, self.samples, self.compares_with_itself)
        tables = [self.kernel]
        if record.activation_neighbors is not None:
            tables.append(_Neighbors(record.activation_neighbors, self.samples, self.compares_with_itself))
        self.tables = [table for table in tables if table.k >= _FEWEST_NEIGHBORS]
        self.columns: dict[str, Any] = {"sample_id": self.samples["sample_id"], "index": self.samples["index"]}
        if self.view.has_labels:
            self.columns["label"] = self.samples["label"]
        self.scales: dict[str, float] = {}
        self.notes: list[str] = []
        self.skipped = self._skip()

    def find(self, name: str) -> None:
        """Add the columns of one issue."""
        finders = {
            "label": self._class_label if self.view.is_classified else self._value_label,
            "near_duplicate": self._near_duplicate,
            "outlier": self._outlier,
            "hard": lambda: 1 - self._far("hard", self.samples["margin"].to_numpy(dtype=np.float64)),
            "leak": self._leak,
        }
        score = finders[name]()
        level = self.levels["value_label" if name == "label" and not self.view.is_classified else name]
        self.columns[f"is_{name}_issue"] = score < level
        self.columns[f"{name}_score"] = score

    def _skip(self) -> dict[str, str]:
        """Return why some issues cannot be looked for."""
        reasons = {}
        if not self.view.has_labels:
            reasons["label"] = "The samples have no labels, or several each."
        elif self.kernel.labels is None:
            reasons["label"] = "The neighbors have no labels."
        elif self.kernel.present.any() and label_kind(self.kernel.labels[self.kernel.present].tolist()) != self.view.label_kind:
            reasons["label"] = "The labels of the neighbors are of another type than those of the samples."
        if "margin" not in self.samples:
            reasons["hard"] = "The outputs are not scores of classes, or the run is of an earlier version."
        if self.kernel.k < _FEWEST_NEIGHBORS:
            few = f"It takes at least {_FEWEST_NEIGHBORS} neighbors of each sample: measure with a larger k."
            reasons |= dict.fromkeys(("near_duplicate", "outlier", "leak"), few)
        elif self.compares_with_itself:
            reasons["leak"] = "The samples were compared with each other: compare them with the training set."
        else:
            reasons["near_duplicate"] = "The samples were compared with another set: compare them with each other."
        return reasons

    def _class_label(self) -> Array:
        """Return the scores of labels that are classes, and put in the labels that have most votes."""
        given, near = self.samples["label"].to_numpy(), np.asarray(self.kernel.labels)
        classes = sorted({*given.tolist(), *near[self.kernel.present].tolist()})
        code = {label: place for place, label in enumerate(classes)}
        labels = torch.tensor([code[label] for label in given.tolist()])
        neighbors = torch.full(near.shape, -1)
        listed = [code[label] for label in near[self.kernel.present].tolist()]
        neighbors[torch.tensor(self.kernel.present)] = torch.tensor(listed).long()
        own = margin = None
        if "prediction" in self.samples and "margin" in self.samples:
            # What the network takes the samples for, in the terms of the labels.
            predictions: list[Any] = self.samples["prediction"].tolist()
            if self.view.label_kind != "class":
                predictions = [self.view.class_name(value) for value in predictions]
            own = torch.tensor([code.get(label, -1) for label in predictions])
            margin = torch.tensor(self.samples["margin"].to_numpy(dtype=np.float64, copy=True))
        votes = label_votes(neighbors, len(classes), own, margin)
        score = label_quality(votes, labels).numpy()
        best = torch.where(votes.amax(1) > votes.gather(1, labels.unsqueeze(1)).squeeze(1), votes.argmax(1), labels)
        best = torch.where(torch.tensor(self.kernel.present.any(1)), best, labels)
        self.columns["suggested_label"] = [classes[place] for place in best.tolist()]
        rare = int((labels.bincount()[labels] < RARE).sum()) if self.compares_with_itself else 0
        if rare:
            self.notes.append(
                f"{rare:,} sample{'s are' if rare > 1 else ' is'} of classes with fewer than {RARE}: no neighbors can "
                "speak for their labels, which are suspect for that alone."
            )
        return np.where(self.kernel.present.any(1), score, np.nan)

    def _value_label(self) -> Array:
        """Return the scores of labels that are values, and put in the means of the neighbors' labels."""
        near = np.asarray(self.kernel.labels, dtype=np.float64)
        present = self.kernel.present & np.isfinite(near)
        weight = rank_weights(torch.tensor(present)).numpy()
        mean = np.where(present.any(1), (weight * np.where(present, near, 0.0)).sum(1), np.nan)
        self.columns["suggested_label"] = mean
        return self._far("value_label", np.abs(self.samples["label"].to_numpy(dtype=np.float64) - mean))

    def _near_duplicate(self) -> Array:
        """Return the chance of so near a neighbor, the least of all pairs of a sample, and put in the sets."""
        position = pd.Series(np.arange(len(self.samples)), index=self.samples["index"])
        pairs = [table.pairs(position) for table in self.tables]
        for other in self.tables[1:]:
            # Where all units are off, only a bias has a gradient: such samples are alike to the kernel, whatever they show.
            seen = other.present.any(1)
            pairs[0] = tuple(column[seen[pairs[0][0]] & seen[pairs[0][1]]] for column in pairs[0])
        rows, partners, chance = (np.concatenate(column) for column in zip(*pairs, strict=True))
        least = np.full(len(self.samples), np.inf)
        # A sample is as near to another as that is to it, whoever lists whom.
        for ends in (rows, partners):
            np.fmin.at(least, ends, chance)
        near = chance < self.levels["near_duplicate"]
        self.columns["near_duplicate_set"] = _connected(len(self.samples), rows[near], partners[near])
        return np.where(np.isfinite(least), least, np.nan)

    def _leak(self) -> Array:
        nearest = [table.chance(table.distance[:, 0], table.radius) for table in self.tables]
        least: Array = np.fmin.reduce(nearest)
        # See `_near_duplicate`: what has no activations is alike to the kernel, whatever it shows.
        seen = np.all([table.present.any(1) for table in self.tables], axis=0)
        return np.where(seen, least, np.nan)

    def _outlier(self) -> Array:
        """Return the density of samples around each, as a share of that around the median one."""
        farthest = self.kernel.distance[:, -1].numpy()
        median = self.scales["outlier"] = _median(farthest)
        self.scales["dimension"] = self.kernel.dimension
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where((farthest > median) & (median > 0), (median / farthest) ** self.kernel.dimension, 1.0)
        return np.where(np.isfinite(farthest), share, np.nan)

    def _far(self, name: str, values: Array) -> Array:
        """Return m / (m + values), with m the median: 1/2 there, and for all if everything is 0."""
        median = self.scales[name] = _median(values)
        return np.where(values + median > 0, median / np.where(values + median > 0, values + median, 1), values * 0 + 0.5)


class _Neighbors:
    """A table of neighbors, a row for each sample.

    Attributes:
        neighbor: shape (N, k), the index of each neighbor; -1 where there is none.
        labels: theirs, shape (N, k); None if they have none.
        present: shape (N, k), where there is one.
        distance: shape (N, k), of unit vectors; NaN where there is none.
        k: how many there are at most.
    """

    def __init__(self, table: pd.DataFrame, samples: pd.DataFrame, same: bool) -> None:
        self.k = int(table["rank"].max()) if len(table) else 1
        rows = pd.Series(np.arange(len(samples)), index=samples["index"]).reindex(table["index"]).to_numpy()
        if np.isnan(rows).any():
            raise expected("neighbors", "those of samples of the record", "an index that is none of theirs")
        places, shape = (rows.astype(np.int64), table["rank"].to_numpy() - 1), (len(samples), self.k)
        similarity, self.neighbor = np.full(shape, np.nan), np.full(shape, -1)
        similarity[places], self.neighbor[places] = table["similarity"], table["neighbor"]
        self.labels: Array | None = None
        if "label" in samples and same:
            found = pd.Series(samples["label"].to_numpy(), index=samples["index"]).reindex(table["neighbor"])
        else:
            found = table.get("neighbor_label")
        if found is not None:
            self.labels = np.empty(shape, dtype=found.to_numpy().dtype)
            self.labels[places] = found.to_numpy()
        self.present = np.isfinite(similarity)
        # What differs from 1 by rounding is a copy.
        gap = np.where(1 - similarity <= _ROUNDING, 0.0, 1 - similarity)
        self.distance = torch.tensor(2 * gap).sqrt()

    @cached_property
    def radius(self) -> torch.Tensor:
        """Return the distance of the last neighbor of each sample, see `neighbor_radius`."""
        return neighbor_radius(self.distance)

    @cached_property
    def dimension(self) -> float:
        """Return the dimension of the data set."""
        dimension = neighbor_dimension(self.distance)
        return 1.0 if math.isnan(dimension) else min(dimension, _MOST_DIMENSIONS)

    def chance(self, distance: torch.Tensor, radius: torch.Tensor) -> Array:
        """Return the chance of a neighbor within `distance` where k of them lie within `radius`."""
        chance: Array = -torch.expm1(-expected_neighbors(distance, radius, self.k, self.dimension)).numpy()
        return chance

    def pairs(self, position: pd.Series) -> tuple[Array, Array, Array]:
        """Return every listed pair, as the rows of both and the chance of so near a neighbor.

        Args:
            position: the row of each index.
        """
        rows, places = np.nonzero(self.present)
        partners = position.reindex(self.neighbor[rows, places]).to_numpy(copy=True)
        if np.isnan(partners).any():
            raise expected("neighbors", "samples of the record", "an index that is none of theirs")
        radius = (self.radius[rows] * self.radius[partners]).sqrt()
        return rows, partners, self.chance(self.distance[rows, places], radius)


def _median(values: Array) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _connected(number: int, ones: Array, others: Array) -> Array:
    """Return the number of the set that each of N samples is in, the largest set first; -1 for one by itself."""
    parent = list(range(number))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        parent[max(root(one), root(other))] = min(root(one), root(other))
    roots = np.array([root(node) for node in range(number)], dtype=np.int64)
    first, size = np.unique(roots, return_counts=True)
    several = [place for place in np.argsort(-size, kind="stable") if size[place] > 1]
    names = {int(first[place]): name for name, place in enumerate(several)}
    return np.array([names.get(node, -1) for node in roots.tolist()], dtype=np.int64)
