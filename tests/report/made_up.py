"""A made-up record on real images: handwritten digits, the cosine of raw pixels as the kernel."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

from lightning_netsim.records.record import Record

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@lru_cache(maxsize=1)
def images() -> np.ndarray:
    return load_digits().images


def thumbnail(index: int) -> np.ndarray:
    return (images()[index] * 255 / 16).astype(np.uint8)


def neighbor_table(kernel: np.ndarray, k: int) -> pd.DataFrame:
    rows = []
    for i, row in enumerate(kernel):
        others = sorted((j for j in range(len(row)) if j != i), key=lambda j: (-row[j], j))[:k]
        rows += [(i, rank, j, row[j]) for rank, j in enumerate(others, start=1)]
    return pd.DataFrame(rows, columns=["index", "rank", "neighbor", "similarity"])


def make_record(n: int = 60, k: int = 10, labels: bool = True, activations: bool = False, **meta: object) -> Record:
    digits = load_digits()
    pixels, target = digits.data[:n], digits.target[:n]
    units = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    kernel = units @ units.T
    count = kernel.sum(axis=1)
    columns = {"sample_id": np.arange(n), "index": np.arange(n), "dataloader": 0}
    if labels:
        wrong = np.arange(n) % 20 == 7
        columns |= {"label": target, "prediction": np.where(wrong, (target + 1) % 10, target)}
    columns |= {"soft_count": count, "neighbor_fraction": count / n}
    if labels:
        columns["same_class_fraction"] = [float((kernel[i] * (target == target[i])).sum() / count[i]) for i in range(n)]
    columns |= {"gradient_norm": np.linalg.norm(pixels, axis=1), "rank": 10}
    facts = {
        "epoch": 4,
        "global_step": 225,
        "stage": "validation",
        "num_reference": n,
        "reference": "self",
        "recall": 1.0,
        "k": k,
    }
    centered = units - units.mean(axis=0)
    other = neighbor_table(centered @ centered.T, k) if activations else None
    names = {"class_names": list(NAMES)} if labels else {}
    return Record(pd.DataFrame(columns), neighbor_table(kernel, k), facts | names | meta, other)


def extremes(record: Record, number: int = 5) -> tuple[list[int], list[int]]:
    """Find the most isolated and the most crowded samples the slow way."""
    pairs = [(c, i) for c, i in zip(record.samples["soft_count"], record.samples["index"], strict=True) if not np.isnan(c)]
    pairs.sort()
    return [i for _, i in pairs[:number]], [i for _, i in pairs[::-1][:number]]
