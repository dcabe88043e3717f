"""The whole measurement without a Trainer: in a script or a notebook, on any module and loader."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.analysis.issues import IssueReport, find_issues
from lightning_netsim.data.sources import from_loader
from lightning_netsim.jacobian.directions import DirectionsLike
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
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


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    reference: Iterable[Any] | None = None,
    k: int = 10,
    *,
    directions: DirectionsLike = "auto",
    parameters: str | Iterable[str] = "trainable",
    thresholds: Iterable[float] = (),
    powers: Iterable[float] = (),
    max_samples: int | None = None,
    projection_dim: int = 2048,
    index_factory: str = "Flat",
    plan: str = "auto",
    precision: str = "float32",
    memory_budget: float | None = None,
    compare_activations: bool = True,
    activation_layer: str | None = None,
    render: Callable[[Any], Any] | None = None,
    class_names: Iterable[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> SimilarityAnalysis:
    """Count the neighbors of every sample under a network's gradient kernel, and find the nearest ones.

    N_S(x) = Σ_j k(x, x_j) over the reference set, with k the normalized inner product of the outputs' gradients with respect to
    the parameters. The model is put in eval mode for the time of the call and left as it was found.

    Args:
        model: a LightningModule or any module; see `read_batch` for how batches are read.
        loader: the samples that are asked about: a DataLoader, or an iterable of batches that can be iterated again.
        reference: the samples that are counted and searched; None compares the samples with themselves.
        k: the number of neighbors.
        directions: which functions of the outputs are differentiated: "auto" (all of up to four outputs, else four random
            directions), "all", a number of random directions, a (D, d) matrix or a function; see `Directions`.
        parameters: "trainable", or names of parameters or modules.
        thresholds: τ of hard counts, in [-1, 1]: exact where all pairs are compared, else estimated with a measured error.
        powers: α of power counts; likewise.
        max_samples: measure a fixed random subset of this many samples of each set.
        projection_dim: the width of the sketches that candidates are found by, before these are compared exactly.
        index_factory: a faiss `index_factory` string for the search of candidates.
        plan: "store" compares all pairs, "sketch" only candidates, both with exact features in memory; "reiterate" sweeps
            again where those do not fit; "auto" takes the one with the shortest expected time within the budget.
        precision: "float32", or "inherit" to differentiate in the precision of the surrounding autocast.
        memory_budget: bytes that features may take; None for a quarter of the free memory of the device.
        compare_activations: find neighbors under activations too.
        activation_layer: the module whose output they are; None for the input of the last linear layer.
        render: turns one sample of the inputs into a picture (array) or a text.
        class_names: names of the classes 0, 1, 2, ...
        progress: show a progress bar and the plan.
        seed: seed of random directions, sketch and subset.

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
    settings = SweepSettings(
        k=k,
        directions=directions,
        parameters=parameters,
        thresholds=tuple(thresholds),
        powers=tuple(powers),
        projection_dim=projection_dim,
        index_factory=index_factory,
        plan=plan,
        precision=precision,
        memory_budget=memory_budget,
        compare_activations=compare_activations,
        activation_layer=activation_layer,
        seed=seed,
    )
    move = to_device_of(model)
    with borrowed(model, progress) as tell:
        queries = from_loader(loader, move, max_samples, seed)
        others = None if reference is None else from_loader(reference, move, max_samples, seed)
        announce = (lambda text: print(f"netsim: {text}", file=sys.stderr)) if progress else None
        result = measure_similarity(model, queries, others, settings, render=render, progress=tell, announce=announce)
    context = {
        "stage": "analyze",
        "epoch": None,
        "global_step": None,
        "reference": "self" if reference is None else "other",
        "weights": "raw",
        "class_names": None if class_names is None else list(class_names),
    }
    pictures = Pictures(result, getattr(loader, "dataset", None), getattr(reference, "dataset", None))
    return SimilarityAnalysis(make_record(result, settings, context), result, pictures)


def load_run(path: str | os.PathLike[str]) -> SimilarityAnalysis:
    """Read a record from disk: the directory of one, or a run's log directory, of which the newest is taken.

    Raises:
        ValueError: if there is none, or if it was written by a newer version.
    """
    return SimilarityAnalysis(newest_record(path))
