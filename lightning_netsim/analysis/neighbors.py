"""Answer for a handful of samples, exactly and in one sweep: who their neighbors are, and how many."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
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
from lightning_netsim.functional.results import NeighborCountResult
from lightning_netsim.jacobian.capture import full_float32
from lightning_netsim.jacobian.feature_batches import GradientFeatureBatch
from lightning_netsim.measurement.plan import chunk_of, memory_budget
from lightning_netsim.measurement.progress import Progress
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.sample_table import SampleTable, describe
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.measurement.sweep import FeatureReader, Sweeper, Swept
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


@takes_settings("k", "directions", "parameters", "max_samples", "render", "class_names", "seed")
def find_neighbors(  # noqa: D417  `takes_settings` tells what k is
    model: nn.Module,
    loader: Iterable[Any],
    queries: Iterable[int],
    reference: Iterable[Any] | None = None,
    k: int = SweepSettings.k,
    *,
    progress: bool = True,
    **settings: Any,
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
        reference: the samples that are searched and counted, in the same form; None for those of `loader`. `max_samples` is
            of these.
        progress: show a progress bar.
        **settings: see `SweepSettings`.

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
    chosen = SweepSettings(k=k, compare_activations=False, **settings)
    move = to_device_of(model)
    asked = Samples(loader, move)
    compared = Samples(loader if reference is None else reference, move, chosen.max_samples, chosen.seed)
    return answer_neighbors(
        model,
        asked,
        compared,
        check_positions("queries", queries, asked.source.extent),
        chosen,
        same=reference is None,
        context={"reference": "the loader" if reference is None else "the reference"},
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
    context: Mapping[str, Any],
    progress: bool = True,
) -> NeighborAnswer:
    """Find what `find_neighbors` finds, of sets that are open already.

    Args:
        model: the network.
        asked: where the queries are.
        compared: the reference set.
        positions: those of the queries in `asked`, ascending.
        settings: those that `find_neighbors` takes.
        same: whether both are the same set.
        context: stage and reference, for the record.
        progress: show a progress bar.
    """
    start = time.perf_counter()
    if compared.source.num_samples is not None:
        check_neighbors_fit(settings.k, compared.source.num_samples, same)
    with borrowed(model, progress) as tell, full_float32():
        result = _search(model, asked.pick(positions), compared, settings, same, tell)
    pictures = Pictures(result, asked.dataset, compared.dataset)
    record = make_record(result, settings, {**context, "seconds": time.perf_counter() - start})
    return NeighborAnswer(record, pictures)


def _search(
    model: nn.Module, asked: list[Chunk], compared: Samples, settings: SweepSettings, same: bool, progress: Progress
) -> SimilarityResult:
    """Go through the reference set once, with the features of the samples asked for in memory."""
    budget = memory_budget(settings)
    reader, queries = FeatureReader(model, settings), SampleTable(budget, settings.render)
    reader.prepare(compared.first())
    own: list[GradientFeatureBatch] = []
    for chunk in asked:
        for part in chunk.split(PICKED_TOGETHER):
            swept = reader.read(part)
            queries.add(part, swept.read, swept.features)
            own.append(swept.features)
    sample_set, device = queries.sample_set(), own[0].jacobian.outputs.device
    table = NeighborTable(len(sample_set.index), settings.k, device)
    soft = torch.zeros(len(sample_set.index), dtype=torch.float64)
    num_seen = num_valid = 0

    def compare(swept: Swept) -> Tensor:
        return torch.cat([batch.inner(swept.features) for batch in own])

    sweeper = Sweeper(reader, chunk_of(own[0].jacobian, budget), seed=settings.seed, progress=progress)
    for swept, similarity in sweeper.sweep(compared.source, "neighbors", compare):
        table.offer(similarity, swept.chunk.index, exclude=sample_set.index if same else None)
        soft += to_double(similarity).nansum(1).cpu()
        num_seen += len(swept.chunk.index)
        num_valid += len(swept.valid_ids)
    check_neighbors_fit(settings.k, num_seen, same)
    left_out = queries.rank == 0
    soft[left_out] = torch.nan
    neighbors = table.result(recall=1.0)
    # Of the reference set, what is known of the samples that are somebody's neighbor; the others are not kept.
    listed = torch.unique(neighbors.index)
    shown = describe(model, compared, listed[listed >= 0].tolist(), SampleTable(budget, settings.render))
    return SimilarityResult(
        counts=NeighborCountResult(soft, num_valid),
        neighbors=neighbors,
        activation_neighbors=None,
        queries=sample_set,
        reference=shown,
        margin=queries.margin(),
        predictions=queries.predictions(),
        norm=queries.norm,
        rank=queries.rank,
        num_left_out=num_seen - num_valid + (0 if same else int(left_out.sum())),
        num_directions=own[0].num_directions,
        plan={"kind": "queries", "methods": reader.gradients.operator.ownership.methods()},
        similarity_error=0.0,
        sweep_disagreement=None,
        notes=tuple(sorted(reader.gradients.notes)),
    )
