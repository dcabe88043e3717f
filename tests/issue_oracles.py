"""Made-up records with issues, and these found the slow way: one sample, one pair at a time, in Python's own floats."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, median_low
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lightning_netsim.functional.label_quality import OWN_VOTE
from lightning_netsim.records.record import Record

NAN = math.nan
MOST_DIMENSIONS = 100


def units(number: int, dimension: int = 6, seed: int = 0, classes: int = 3, spread: float = 0.7) -> tuple[Any, Any]:
    """Return gradients of length one around a center for each class, (number, dimension), and the classes."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, dimension))
    classes_of = np.arange(number) % classes
    points = centers[classes_of] + spread * generator.normal(size=(number, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True), classes_of


def record_of(
    gradients: Any,
    k: int,
    labels: Sequence[Any] | None = None,
    reference: Any = None,
    reference_labels: Sequence[Any] | None = None,
    predictions: Sequence[Any] | None = None,
    margin: Sequence[float] | None = None,
    index: Sequence[int] | None = None,
    ids: Sequence[Any] | None = None,
    left_out: Iterable[int] = (),
    **meta: Any,
) -> Record:
    """Return the record of samples with the given unit gradients, compared with each other or with a reference set.

    Args:
        left_out: rows of samples without a usable gradient: they have no neighbors, and are none.
        index: the samples' positions in the data set; by default 0, 1, 2, ...
    """
    number, itself, out = len(gradients), reference is None, set(left_out)
    others = gradients if itself else reference
    index = list(range(number)) if index is None else list(index)
    names = index if itself else list(range(len(others)))
    rows = []
    for i in set(range(number)) - out:
        # Rounded, so that a sample has similarity one to its copies.
        value = {j: round(float(np.dot(gradients[i], others[j])), 12) for j in range(len(others))}
        pool = [j for j in value if not itself or (j != i and j not in out)]
        nearest = sorted(pool, key=lambda j: (-value[j], j))[:k]
        for rank, j in enumerate(nearest, start=1):
            row = {"index": index[i], "rank": rank, "neighbor": names[j], "similarity": value[j]}
            rows.append(row if itself or reference_labels is None else {**row, "neighbor_label": reference_labels[j]})
    columns = {"sample_id": index if ids is None else ids, "index": index, "dataloader": 0}
    optional = {"label": labels, "prediction": predictions, "margin": margin}
    columns |= {name: values for name, values in optional.items() if values is not None}
    counts = [NAN if i in out else 1.0 for i in range(number)]
    columns |= {"soft_count": counts, "neighbor_fraction": counts, "gradient_norm": 1.0, "rank": 1}
    facts = {"reference": "self" if itself else "training", "num_reference": len(others), "k": k}
    return Record(pd.DataFrame(columns), pd.DataFrame(rows), facts | meta)


def clear_record(number: int = 45, k: int = 6, every: int = 9, **options: Any) -> Record:
    """Return a record of three classes, every ninth label wrong, with what the network says of each sample."""
    gradients, classes = units(number)
    labels = [int(c + 1) % 3 if row % every == 4 else int(c) for row, c in enumerate(classes)]
    margin = np.random.default_rng(3).uniform(size=number)
    given = {"labels": labels, "predictions": classes.tolist(), "margin": margin, **options}
    return record_of(gradients, k, **given)


def flawed(**options: Any) -> Record:
    """Return a record with wrong labels and a set of three copies."""
    gradients, classes = units(45)
    gradients[[12, 30]] = gradients[3]
    labels = [int(c + (row % 9 == 4)) % 3 for row, c in enumerate(classes)]
    return record_of(gradients, 6, options.pop("labels", labels), predictions=classes.tolist(), margin=[0.9] * 45, **options)


def leaking() -> Record:
    gradients, classes = units(20)
    others, other_classes = units(40, seed=5)
    gradients[:3] = others[7]
    return record_of(gradients, 6, classes.tolist(), others, other_classes.tolist())


class Small(nn.Sequential):
    """A network that learns labels, right or wrong."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def learn(self, inputs: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(inputs), labels).backward()
            optimizer.step()


def planted(size: int = 300) -> tuple[Tensor, Tensor, list[int], list[list[int]]]:
    """Return clustered samples, labels of which 10 % are wrong, which ones are, and the sets of copies."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(size) % 4
    inputs = 2 * torch.randn(4, 8, generator=generator)[classes] + 0.9 * torch.randn(size, 8, generator=generator)
    inputs[1] = inputs[0]
    inputs[size - 15 :] = inputs[[*range(10), *[20] * 5]]
    wrong = torch.randperm(size - 20, generator=generator)[: size // 10].tolist()
    classes[1] = classes[0]
    classes[size - 15 :] = classes[[*range(10), *[20] * 5]]
    labels = classes.clone()
    labels[wrong] = (classes[wrong] + torch.randint(1, 4, (len(wrong),), generator=generator)) % 4
    pairs = [[row, size - 15 + row] for row in range(2, 10)]
    return inputs, labels, wrong, [[20, *range(size - 5, size)], [0, 1, size - 15, size - 14], *pairs]


def distances(record: Record) -> dict[int, list[float]]:
    """Return the distances of each sample's neighbors, nearest first; none of a sample that was left out."""
    found: dict[int, list[float]] = {index: [] for index in record.samples["index"].tolist()}
    for row in record.neighbors.sort_values("rank").to_dict("records"):
        found[row["index"]].append(math.sqrt(2 * max(1 - row["similarity"], 0)))
    return found


def neighbor_labels(record: Record) -> dict[int, list[Any]]:
    own = dict(zip(record.samples["index"].tolist(), record.samples["label"].tolist(), strict=True))
    found: dict[int, list[Any]] = {index: [] for index in own}
    for row in record.neighbors.sort_values("rank").to_dict("records"):
        found[row["index"]].append(own[row["neighbor"]] if record.meta["reference"] == "self" else row["neighbor_label"])
    return found


def votes(near: Sequence[Any], prediction: Any = None, margin: float | None = None) -> dict[Any, float]:
    """Return the votes for each label; without a margin the network has none."""
    total = sum(1 / math.sqrt(rank) for rank in range(1, len(near) + 1))
    found: dict[Any, float] = defaultdict(float)
    for rank, label in enumerate(near, start=1):
        found[label] += 1 / math.sqrt(rank) / total
    if margin is None:
        return found
    found[prediction] += OWN_VOTE * (0.0 if math.isnan(margin) else margin)
    return {label: vote / (1 + OWN_VOTE) for label, vote in found.items()}


def quality(found: Mapping[Any, float], given: Any) -> tuple[float, Any]:
    """Return the label score, and the label with most votes; a tie keeps the given one."""
    own = found.get(given, 0.0)
    rivals = {label: vote for label, vote in found.items() if label != given}
    best = max(rivals, key=lambda label: rivals[label], default=given)
    most = rivals.get(best, 0.0)
    return 0.5 + 0.5 * (own - most), best if most > own else given


def class_scores(record: Record, named: Mapping[int, Any] | None = None) -> dict[int, tuple[float, Any]]:
    """Return the label score and the suggestion for each sample.

    Args:
        named: the label that each class number stands for; by default the number itself.
    """
    near = neighbor_labels(record)
    known = set(record.samples["label"]) | {label for found in near.values() for label in found}
    scores = {}
    for row in record.samples.to_dict("records"):
        prediction, margin = row.get("prediction"), row.get("margin")
        prediction = prediction if named is None else named.get(prediction)
        found = dict(votes(near[row["index"]], prediction, margin))
        found = {label: vote for label, vote in found.items() if label in known}
        score = quality(found, row["label"]) if near[row["index"]] else (NAN, row["label"])
        scores[row["index"]] = score
    return scores


def value_scores(record: Record) -> dict[int, tuple[float, float]]:
    """Return m / (m + r) and the mean label of the neighbors, for labels that are values."""
    means = {}
    for index, near in neighbor_labels(record).items():
        pairs = [(1 / math.sqrt(rank), label) for rank, label in enumerate(near, start=1) if not math.isnan(label)]
        means[index] = sum(w * y for w, y in pairs) / sum(w for w, _ in pairs) if pairs else NAN
    given = dict(zip(record.samples["index"].tolist(), record.samples["label"].tolist(), strict=True))
    far = {index: abs(given[index] - mean) for index, mean in means.items()}
    middle = median(value for value in far.values() if not math.isnan(value))
    return {index: (share_of_median(far[index], middle), means[index]) for index in far}


def share_of_median(value: float, middle: float) -> float:
    """Return m / (m + value), 1/2 where both are 0."""
    return value if math.isnan(value) else 0.5 if value + middle == 0 else middle / (value + middle)


def dimension_within(table: Iterable[Sequence[float]]) -> float:
    """Return the dimension as `find_issues` takes it: bounded, and one where it is not known."""
    size = dimension(table)
    return 1.0 if math.isnan(size) else min(size, MOST_DIMENSIONS)


def dimension(table: Iterable[Sequence[float]]) -> float:
    """Return ln(k / h) / median ln(d_k / d_h), the lower of two middle values as in torch."""
    rows = [row for row in table if row]
    k = max(map(len, rows))
    h = k // 2
    growth = [math.log(row[k - 1] / row[h - 1]) for row in rows if row[h - 1] > 0]
    if not growth:
        return NAN
    middle = median_low(growth)
    return math.log(k / h) / middle if middle > 0 else math.inf


def radii(table: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Return the distance of the last neighbor, at least a tenth of the (lower) median."""
    last = {index: row[-1] for index, row in table.items() if row}
    least = median_low(last.values()) / 10
    return {index: max(value, least) for index, value in last.items()}


def chance(distance: float, radius: float, k: int, size: float) -> float:
    """Return the chance of a sample as near, where k lie within the radius; one at no distance at all is a copy."""
    if distance == 0:
        return 0.0
    return 1 - math.exp(-k * (distance / radius) ** size)


def pair_chances(record: Record) -> dict[tuple[int, int], float]:
    """Return the chance of each pair that either sample lists."""
    table = distances(record)
    size, radius = dimension_within(table.values()), radii(table)
    pairs: dict[tuple[int, int], float] = {}
    for row in record.neighbors.to_dict("records"):
        i, j = row["index"], row["neighbor"]
        both = math.sqrt(radius[i] * radius[j])
        pairs[i, j] = pairs[j, i] = chance(table[i][row["rank"] - 1], both, max(map(len, table.values())), size)
    return pairs


def duplicate_scores(record: Record) -> dict[int, float]:
    pairs = pair_chances(record)
    indices = record.samples["index"].tolist()
    return {i: min((value for (one, _), value in pairs.items() if one == i), default=NAN) for i in indices}


def duplicate_sets(record: Record, level: float) -> set[frozenset[int]]:
    """Return the connected components with more than one sample, by walking from each sample as far as it goes."""
    joined = defaultdict(set)
    for (i, j), value in pair_chances(record).items():
        if value < level:
            joined[i].add(j)
    sets = set()
    for start in joined:
        reached, ahead = {start}, [start]
        while ahead:
            fresh = joined[ahead.pop()] - reached
            reached |= fresh
            ahead += fresh
        sets.add(frozenset(reached))
    return sets


def leak_scores(record: Record) -> dict[int, float]:
    table = distances(record)
    size, radius = dimension_within(table.values()), radii(table)
    return {i: chance(row[0], radius[i], len(row), size) if row else NAN for i, row in table.items()}


def outlier_scores(record: Record) -> dict[int, float]:
    """Return the density of samples around each, as a share of that around the median one, at most 1."""
    table = distances(record)
    size, middle = dimension_within(table.values()), median(row[-1] for row in table.values() if row)
    return {i: min(1.0, (middle / row[-1]) ** size if row[-1] > 0 else 1.0) if row else NAN for i, row in table.items()}


def hard_scores(record: Record) -> dict[int, float]:
    margins = dict(zip(record.samples["index"].tolist(), record.samples["margin"].tolist(), strict=True))
    middle = median(value for value in margins.values() if not math.isnan(value))
    return {index: 1 - share_of_median(value, middle) for index, value in margins.items()}
