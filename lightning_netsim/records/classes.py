"""Class by class: which classes a network sees as one, and which stand alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lightning_netsim._checks import expected
from lightning_netsim.records.record import Record

#: Two classes merge where they are as similar to each other as this share of what each is within itself.
MERGING = 0.9
#: A class is isolated where that share, to its nearest class, is below this part of the median over classes.
ISOLATED = 0.5


def class_matrix(record: Record) -> pd.DataFrame:
    """Return the mean similarity of the samples of each two classes, one row and one column for each class.

    Raises:
        ValueError: if the record has no classes.
    """
    if record.classes is None:
        remedy = "It has none where labels are missing or are no classes, where memory was short, or of an earlier version."
        raise expected("record", "one with similarities of classes", "none", remedy)
    table = record.classes
    order = list(dict.fromkeys(table["label"]))
    return table.pivot(index="label", columns="other_label", values="similarity").reindex(index=order, columns=order)


def class_summary(record: Record) -> pd.DataFrame:
    """Return one row for each class: how alike its samples are, and how near the nearest other class is.

    With k_ab the mean similarity of samples of classes a and b, the overlap of two classes is k_ab / √(k_aa k_bb): 1 where the
    network tells the samples of one from the other no better than among themselves.

    Args:
        record: of a run with labels that are classes.

    Returns:
        columns `label`, `num_samples`, `similarity` (k_aa; NaN for a class of one sample), `nearest_label` and its `overlap`,
        `is_merging` (overlap at least 0.9) and `is_isolated` (overlap below half the median over the classes).

    Raises:
        ValueError: if the record has no classes.
    """
    matrix = class_matrix(record)
    within = np.diag(matrix.to_numpy()).copy()
    scale = np.sqrt(np.where(within > 0, within, np.nan))
    overlap = matrix.to_numpy() / (scale[:, None] * scale)
    np.fill_diagonal(overlap, np.nan)
    known = np.isfinite(overlap).any(1)
    nearest = np.where(np.isfinite(overlap), overlap, -np.inf).argmax(1)
    best = np.where(known, overlap[np.arange(len(matrix)), nearest], np.nan)
    labels = list(matrix.index)
    numbers = (record.classes if record.classes is not None else pd.DataFrame()).drop_duplicates("label")["num_samples"]
    return pd.DataFrame(
        {
            "label": labels,
            "num_samples": numbers.to_numpy(),
            "similarity": within,
            "nearest_label": [labels[place] if has else None for place, has in zip(nearest, known, strict=True)],
            "overlap": best,
            "is_merging": best >= MERGING,
            "is_isolated": best < ISOLATED * (max(np.nanmedian(best), 0) if known.any() else np.nan),
        }
    )
