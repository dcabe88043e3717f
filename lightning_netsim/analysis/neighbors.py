"""Answer for a handful of samples, exactly and in one sweep: who their neighbors are, and how many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_neighbors_fit
from lightning_netsim.analysis.borrowed import borrowed, to_device_of
from lightning_netsim.data.samples import PICKED_TOGETHER, Samples, check_positions
from lightning_netsim.data.sources import Chunk
from lightning_netsim.estimators import NeighborTable
from lightning_netsim.functional._precision import to_double
from lightning_netsim.functional.results import KernelNeighborsResult, NeighborCountResult
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.jacobian.directions import DirectionsLike
from lightning_netsim.jacobian.feature_batches import GradientFeatureBatch
from lightning_netsim.measurement.plan import chunk_of, memory_budget
from lightning_netsim.measurement.result import SampleSet, SimilarityResult
from lightning_netsim.measurement.sample_table import SampleTable, describe
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.measurement.sweep import Sweeper
from lightning_netsim.records.record import Record, write_record
from lightning_netsim.records.tables import make_record
from lightning_netsim.report.answers import format_neighbors
from lightning_netsim.report.figures import plot_neighbor_rows, save_figure
from lightning_netsim.report.pictures import Pictures


@dataclass(frozen=True, eq=False)
class NeighborAnswer:
    """The exact neighbors and neighbor counts of some samples.

    Attributes:
        record: the tables and what they were made with.
        pictures: what a person sees of the samples.
    """

    record: Record
    pictures: Pictures

    @property
    def samples(self) -> pd.DataFrame:
        """Return one row for each sample that was asked for: counts, label, prediction, gradient norm, rank."""
        return self.record.samples

    @property
    def neighbors(self) -> pd.DataFrame:
        """Return one row for each of them and each neighbor: index, rank, neighbor, similarity, neighbor_label."""
        return self.record.neighbors

    @property
    def meta(self) -> Mapping[str, Any]:
        """Return what the tables were made with."""
        return self.record.meta

    def __str__(self) -> str:
        return format_neighbors(self.record)

    def plot(self) -> Any:
        """Return a matplotlib figure: one row of neighbors for each sample."""
        rows = self.samples["index"].tolist()
        return plot_neighbor_rows(self.record, self.pictures.queries, rows, reference_thumbnails=self.pictures.reference)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write tables, meta.json and neighbors.png to a directory; `load_run` reads it."""
        path = write_record(directory, self.record)
        save_figure(self.plot(), path / "neighbors.png")
        return path


def find_neighbors(
    model: nn.Module,
    loader: Iterable[Any],
    queries: Iterable[int],
    reference: Iterable[Any] | None = None,
    k: int = 10,
    *,
    directions: DirectionsLike = "auto",
    parameters: str | Iterable[str] = "trainable",
    max_samples: int | None = None,
    render: Callable[[Any], Any] | None = None,
    class_names: Iterable[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> NeighborAnswer:
    """Find the exact kernel neighbors and neighbor counts of a few samples, in one sweep over the reference set.

    The k largest k(x, x_j), x itself left out, and N_S(x) = Σ_j k(x, x_j), itself included where it is in the reference set.
    The gradients of the queries are kept, in factored form; those of the reference set come and go. The model is put in eval
    mode for the time of the call and left as it was found.

    Args:
        model: a LightningModule or any module; see `read_batch` for how batches are read.
        loader: where the queries are: a DataLoader, an iterable of batches that can be iterated again, or a list of
            DataLoaders, whose positions go on from one to the next.
        queries: positions in the data set of `loader`, each once; the answer has them in ascending order.
        reference: the samples that are searched and counted, in the same form; None for those of `loader`.
        k: the number of neighbors.
        directions: which functions of the outputs are differentiated; see `Directions`.
        parameters: "trainable", or names of parameters or modules.
        max_samples: search a fixed random subset of this many reference samples.
        render: turns one sample of the inputs into a picture (array) or a text.
        class_names: names of the classes 0, 1, 2, ...
        progress: show a progress bar.
        seed: seed of random directions and subset.

    Returns:
        tables, a figure and a text; similarities as those of `analyze`, whatever the size of the reference set.

    Raises:
        ValueError: for a position out of range, not an integer or there twice; for k ≥ N; or for a model or batch that cannot
            be compared.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019, section 6.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> answer = find_neighbors(nn.Linear(3, 2), loader, queries=[3, 17], k=5, progress=False)
        >>> answer.neighbors.groupby("index").size().to_dict()
        {3: 5, 17: 5}
    """
    settings = SweepSettings(k=k, directions=directions, parameters=parameters, compare_activations=False, seed=seed)
    move = to_device_of(model)
    asked = Samples(loader, move)
    compared = Samples(loader if reference is None else reference, move, max_samples, seed)
    context = {"stage": None, "reference": "the loader" if reference is None else "the reference"}
    return answer_neighbors(
        model,
        asked,
        compared,
        check_positions("queries", queries, asked.source.extent),
        settings,
        same=reference is None,
        render=render,
        context={**context, "class_names": None if class_names is None else list(class_names)},
        progress=progress,
    )


def answer_neighbors(
    model: nn.Module,
    asked: Samples,
    compared: Samples,
    positions: Sequence[int],
    settings: SweepSettings,
    *,
    same: bool,
    render: Callable[[Any], Any] | None = None,
    context: Mapping[str, Any],
    progress: bool = True,
) -> NeighborAnswer:
    """Find what `find_neighbors` finds, of sets that are open already.

    Args:
        model: the network.
        asked: where the queries are.
        compared: the reference set.
        positions: those of the queries in `asked`, ascending.
        settings: k, directions, parameters and seed.
        same: whether both are the same set.
        render: see `find_neighbors`.
        context: stage, reference and class_names, for the record.
        progress: show a progress bar.
    """
    start = time.perf_counter()
    if compared.source.num_samples is not None:
        check_neighbors_fit(settings.k, compared.source.num_samples, same)
    with borrowed(model, progress) as tell, full_float32():
        search = _Search(Sweeper(model, settings, tell), compared, same, render)
        result = search.run(asked.pick(positions))
    pictures = Pictures(result, asked.dataset, compared.dataset)
    context = {"epoch": None, "global_step": None, "weights": "raw", **context, "seconds": time.perf_counter() - start}
    return NeighborAnswer(make_record(result, settings, context), pictures)


class _Search:
    """One sweep over a reference set, with the features of the queries in memory."""

    def __init__(self, sweeper: Sweeper, compared: Samples, same: bool, render: Callable[[Any], Any] | None) -> None:
        self.sweeper, self.compared, self.same, self.render = sweeper, compared, same, render
        self.budget = memory_budget(sweeper.settings)
        self.queries = SampleTable(self.budget, render)

    def run(self, asked: list[Chunk]) -> SimilarityResult:
        """Return what is found for the samples asked for."""
        self.sweeper.prepare(self.compared.first())
        features = [batch for chunk in asked for batch in self._features(chunk)]
        self.sweeper.chunk_size = chunk_of(features[0].jacobian, self.budget)
        own = self.queries.sample_set().index
        neighbors, counts, num_seen = self._sweep(features, own)
        check_neighbors_fit(self.sweeper.settings.k, num_seen, self.same)
        left_out = num_seen - counts.num_reference + (0 if self.same else int((self.queries.rank == 0).sum()))
        return SimilarityResult(
            counts=counts,
            neighbors=neighbors,
            activation_neighbors=None,
            queries=self.queries.sample_set(),
            reference=self._listed(neighbors),
            margin=self.queries.margin(),
            predictions=self.queries.predictions(),
            norm=self.queries.norm,
            rank=self.queries.rank,
            num_left_out=left_out,
            num_directions=features[0].num_directions,
            plan={"kind": "queries", "methods": self.sweeper.gradients.operator.ownership.methods()},
            similarity_error=0.0,
            sweep_disagreement=None,
            notes=tuple(sorted(self.sweeper.gradients.notes)),
            seconds=0.0,
        )

    def _features(self, chunk: Chunk) -> Iterator[GradientFeatureBatch]:
        for part in chunk.split(PICKED_TOGETHER):
            features = self.sweeper.features(part)
            self.queries.add(part, self.sweeper.read(part), features)
            yield features

    def _sweep(self, asked: list[GradientFeatureBatch], own: Tensor) -> tuple[KernelNeighborsResult, NeighborCountResult, int]:
        """Return the neighbors and counts, and how many samples there were."""
        table = NeighborTable(len(own), self.sweeper.settings.k, asked[0].jacobian.outputs.device)
        soft = torch.zeros(len(own), dtype=torch.float64)
        num_seen = num_valid = 0

        def compare(chunk: Chunk, features: GradientFeatureBatch) -> Tensor:
            return torch.cat([batch.inner(features) for batch in asked])

        for chunk, features, similarity in self.sweeper.sweep(self.compared.source, "neighbors", compare):
            table.offer(similarity, chunk.index, exclude=own if self.same else None)
            soft += to_double(similarity).nansum(1).cpu()
            num_seen += len(chunk.index)
            num_valid += int(features.valid.sum())
        soft[self.queries.rank == 0] = torch.nan
        return table.result(recall=1.0), NeighborCountResult(soft, num_valid), num_seen

    def _listed(self, neighbors: KernelNeighborsResult) -> SampleSet:
        """Return what is known of the samples that are somebody's neighbor; the others are not kept."""
        listed = torch.unique(neighbors.index)
        return describe(self.sweeper.model, self.compared, listed[listed >= 0].tolist(), SampleTable(self.budget, self.render))
