"""The neighbor table as a sparse matrix, for other packages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lightning_netsim._checks import expected
from lightning_netsim.records.record import Record


def knn_graph(record: Record) -> Any:
    """Return the distances of the k nearest neighbors of every sample, as a sparse matrix that cleanlab's Datalab accepts.

    d_ij = √(2(1 − k(x_i, x_j))), the distance of unit gradients, in [0, 2]; each row holds k of them, nearest first: for
    `Datalab(data, label_name="label").find_issues(knn_graph=analysis.knn_graph())`.

    Args:
        record: of samples that were compared with each other.

    Returns:
        a `scipy.sparse.csr_matrix` of shape (N, N), float64, in the order of the samples table; distances of 0 are stored.

    Raises:
        ValueError: if the samples were compared with another set, or one was left out and has no neighbors; or without scipy.
    """
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        remedy = 'Install it: pip install "lightning-netsim[datalab]".'
        raise expected("scipy", "installed for a sparse matrix", "no such package", remedy) from error
    reference = record.meta.get("reference") or "self"
    if reference != "self":
        raise expected("record", "of samples that were compared with each other", f"one whose reference is {reference!r}")
    index = record.samples["index"].to_numpy()
    table = record.neighbors.sort_values(["index", "rank"], kind="stable")
    counts = table["index"].value_counts().reindex(index, fill_value=0)
    number = int(counts.max()) if len(counts) else 0
    if number == 0 or int(counts.min()) < number:
        bad = int(counts.index[counts.to_numpy() < max(1, number)][0]) if len(counts) else 0
        remedy = "Measure again without the samples that were left out."
        raise expected("record", "one in which every sample has neighbors", f"none, or too few, for sample {bad}", remedy)
    position = pd.Series(np.arange(len(index)), index=index)
    distance = np.sqrt(2 * np.clip(1 - table["similarity"].to_numpy(), 0, None)).reshape(-1, number)
    columns = position.reindex(table["neighbor"]).to_numpy().reshape(-1, number)
    order = position.reindex(table["index"].to_numpy().reshape(-1, number)[:, 0]).to_numpy().argsort()
    pointers = np.arange(0, number * len(index) + 1, number)
    return csr_matrix((distance[order].ravel(), columns[order].ravel(), pointers), shape=(len(index), len(index)))
