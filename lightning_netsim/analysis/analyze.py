"""The whole measurement without a Trainer: in a script or a notebook, on any module and loader."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.analysis.issues import IssueReport, find_issues
from lightning_netsim.data.sources import from_loader
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.records.classes import class_matrix, class_summary
from lightning_netsim.records.knn_graph import knn_graph
from lightning_netsim.records.record import Record, newest_record, write_record
from lightning_netsim.records.tables import make_record
from lightning_netsim.records.view import RecordView
from lightning_netsim.report.classes import plot_class_similarity
from lightning_netsim.report.figures import plot_count_histogram, plot_neighbor_rows
from lightning_netsim.report.html import record_to_html
from lightning_netsim.report.pictures import Pictures
from lightning_netsim.report.summary import format_summary


class SimilarityAnalysis:
    """What a measurement found, as tables and pictures.

    Attributes:
        record: the tables, as they stand on disk.
        result: the tensors behind them; None for a run that was loaded from disk.
    """

    def __init__(self, record: Record, result: SimilarityResult | None = None, pictures: Pictures | None = None) -> None:
        self.record = record
        self.result = result
        self._pictures = pictures or Pictures(None, None)

    def __repr__(self) -> str:
        meta = self.record.meta
        return f"SimilarityAnalysis({meta['num_samples']} samples, k={meta['k']}, recall={meta['recall']})"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return record_to_html(self.record, self._pictures.queries, self._pictures.reference)

    @property
    def samples(self) -> pd.DataFrame:
        """Return one row for each sample: counts, label, prediction, gradient norm, rank."""
        return self.record.samples

    @property
    def neighbors(self) -> pd.DataFrame:
        """Return one row for each sample and neighbor: index, rank, neighbor, similarity."""
        return self.record.neighbors

    @property
    def activation_neighbors(self) -> pd.DataFrame | None:
        """Return the neighbors under activations, in the same form; None if they were not asked for."""
        return self.record.activation_neighbors

    @property
    def meta(self) -> Mapping[str, Any]:
        """Return what the tables were made with."""
        return self.record.meta

    def find_issues(
        self, issues: str | Iterable[str] | None = None, thresholds: Mapping[str, float] | None = None
    ) -> IssueReport:
        """Find wrong labels, near-duplicates, outliers, hard samples and leaks; see `lightning_netsim.find_issues`."""
        return find_issues(self.record, issues, thresholds, self._pictures.queries)

    def class_similarity(self) -> pd.DataFrame:
        """Return the mean similarity of each two classes, exact, as a matrix with their labels."""
        return class_matrix(self.record)

    def class_summary(self) -> pd.DataFrame:
        """Return one row for each class: its nearest other class, and whether both merge."""
        return class_summary(self.record)

    def knn_graph(self) -> Any:
        """Return the distances of all neighbors as a sparse matrix that cleanlab's Datalab accepts."""
        return knn_graph(self.record)

    def summary(self) -> str:
        """Return the figures that matter most, to read in a terminal."""
        return format_summary(self.record)

    def plot_counts(self) -> Any:
        """Return a matplotlib figure: the histogram of neighbor counts, with a sample for each bin."""
        return plot_count_histogram(self.record, self._pictures.queries)

    def plot_neighbors(self, queries: list[int] | None = None, num_rows: int = 6) -> Any:
        """Return a matplotlib figure: rows of neighbors, of the samples `queries` or of some from isolated to crowded."""
        return plot_neighbor_rows(self.record, self._pictures.queries, queries, num_rows, self._pictures.reference)

    def plot_class_similarity(self) -> Any:
        """Return a matplotlib figure: how alike each two classes are to the network."""
        return plot_class_similarity(self.class_similarity(), RecordView(self.record).class_name)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the tables to a directory; `load_run` reads them."""
        return write_record(directory, self.record)


@takes_settings()
def analyze(  # noqa: D417  `takes_settings` tells what k is
    model: nn.Module,
    loader: Iterable[Any],
    reference: Iterable[Any] | None = None,
    k: int = SweepSettings.k,
    *,
    progress: bool = True,
    **settings: Any,
) -> SimilarityAnalysis:
    """Count the neighbors of every sample under a network's gradient kernel, and find the nearest ones.

    N_S(x) = Σ_j k(x, x_j) over the reference set, with k the normalized inner product of the outputs' gradients with respect to
    the parameters. The model is put in eval mode for the time of the call and left as it was found.

    Args:
        model: a LightningModule or any module; see `read_batch` for how batches are read.
        loader: the samples that are asked about: a DataLoader, or an iterable of batches that can be iterated again.
        reference: the samples that are counted and searched; None compares the samples with themselves.
        progress: show a progress bar and the plan.
        **settings: see `SweepSettings`.

    Returns:
        tables, figures and an HTML view for a notebook.

    Raises:
        ValueError: for a model or batch that cannot be compared, k ≥ N, or a memory budget that is too small.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> analysis = analyze(nn.Linear(3, 2), loader, k=3, progress=False)
        >>> analysis.neighbors.shape
        (60, 4)
    """
    chosen = SweepSettings(k=k, **settings)
    move = to_device_of(model)
    with borrowed(model, progress) as tell:
        queries = from_loader(loader, move, chosen.max_samples, chosen.seed)
        others = None if reference is None else from_loader(reference, move, chosen.max_samples, chosen.seed)
        announce = (lambda text: print(f"netsim: {text}", file=sys.stderr)) if progress else None
        result = measure_similarity(model, queries, others, chosen, progress=tell, announce=announce)
    pictures = Pictures(result, getattr(loader, "dataset", None), getattr(reference, "dataset", None))
    return SimilarityAnalysis(make_record(result, chosen, {"stage": "analyze"}), result, pictures)


def load_run(path: str | os.PathLike[str]) -> SimilarityAnalysis:
    """Read a record from disk: the directory of one, or a run's log directory, of which the newest is taken.

    Raises:
        ValueError: if there is none, or if it was written by a newer version.
    """
    return SimilarityAnalysis(newest_record(path))
