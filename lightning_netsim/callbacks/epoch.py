"""Measure the samples of one evaluation epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_netsim._checks import check_neighbors_fit, expected
from lightning_netsim.callbacks.collector import Collector, WeightSnapshot, transfer
from lightning_netsim.data.processes import Processes
from lightning_netsim.data.sources import SampleSource, from_loader, is_indexed
from lightning_netsim.jacobian.isolation import mute, unchanged
from lightning_netsim.measurement.measure import check_model, measure_similarity
from lightning_netsim.measurement.plan import memory_budget
from lightning_netsim.measurement.progress import Progress, progress_bar
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from lightning_netsim.report.pictures import Pictures

_NAMED_BY_POSITION = (
    "A loader has no index: its samples are named by their position, which must not change from epoch to epoch. "
    "Give `ids` otherwise."
)


class EpochMeasurement:
    """One evaluation epoch of a Trainer: see its batches, then measure.

    Args:
        trainer: the trainer, at the start of an evaluation loop.
        pl_module: the model.
        settings: what is measured.
        reference: None, "train" or a loader.

    Raises:
        ValueError: if there is no loader or one whose samples cannot be told apart, or k ≥ N is known already.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, settings: SweepSettings, reference: Any) -> None:
        self.trainer, self.pl_module, self.settings = trainer, pl_module, settings
        self.loaders = flat_loaders(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
        self.reference_loader = _training_loader(trainer) if reference == "train" else reference
        self._check_loaders()
        self._reference: SampleSource | None = None
        if self.reference_loader is not None:
            self._reference = from_loader(self.reference_loader, transfer(trainer), settings.max_samples, settings.seed)
        num_batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        budget = memory_budget(settings)
        self._collector = Collector(trainer, self.loaders, num_batches, settings.max_samples, budget, settings.seed)
        size = self._collector.num_samples if reference is None else None
        if self._reference is not None:
            size = self._reference.num_samples
        if size is not None:
            check_neighbors_fit(settings.k, size, reference is None)
        self._snapshot: WeightSnapshot | None = None

    def see(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Take note of a batch before the model does."""
        if self._snapshot is None and not self._collector.length_is_known:
            self._snapshot = WeightSnapshot(self.pl_module)
        self._collector.add(batch, batch_idx, dataloader_idx)

    def is_last(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Return whether the epoch is known to end with this batch."""
        return self._collector.is_last(batch_idx, dataloader_idx)

    def check(self, batch: Any, batch_idx: int) -> None:
        """Raise now what would otherwise be raised by the first measurement."""
        with self._isolated():
            check_model(self.pl_module, batch, batch_idx, self.settings)

    def measure(self, announce: Callable[[str], None] | None) -> tuple[SimilarityResult, Pictures]:
        """Measure the samples seen, leaving everything else as it is."""
        with ExitStack() as stack:
            stack.enter_context(self._isolated())
            if self._snapshot is not None:
                stack.enter_context(self._snapshot.in_place())
            if self.settings.precision == "inherit":
                stack.enter_context(self.trainer.precision_plugin.forward_context())
            progress = stack.enter_context(shown_progress(self.trainer))
            result = measure_similarity(
                self.pl_module,
                self._collector.source(self.pl_module),
                self._reference,
                self.settings,
                progress=progress,
                announce=announce,
                processes=Processes.current(),
            )
        if result.queries.ids is None and not all(is_indexed(loader) for loader in self.loaders):
            result = replace(result, notes=(*result.notes, _NAMED_BY_POSITION))
        datasets = [getattr(loader, "dataset", None) for loader in (self.loaders[0], self.reference_loader)]
        return result, Pictures(result, *datasets)

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        with isolate_rng(), unchanged(self.pl_module):
            mute(self.pl_module, LightningModule)  # What the forward pass would log is not of this epoch.
            yield

    def _check_loaders(self) -> None:
        if not self.loaders:
            raise expected("loader", "at least one validation loader", "none")
        trainer = self.trainer
        evaluation = trainer.test_loop if trainer.testing else trainer.validate_loop
        loop: Any = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else evaluation
        if len(self.loaders) > 1 and not loop._is_sequential:
            remedy = 'Return a list of loaders, or use CombinedLoader(..., mode="sequential").'
            raise expected("loader", "validation loaders gone through one after the other", "a combination of them", remedy)
        loaders = self.loaders if self.reference_loader is None else [*self.loaders, self.reference_loader]
        if trainer.world_size > 1 and not all(is_indexed(loader) for loader in loaders):
            wanted = "a DataLoader of a data set with an index and a length, since several processes share it"
            raise expected("loader", wanted, "one without", "Use a single device.")


def flat_loaders(loaders: Any) -> list[Any]:
    """Return the loaders of a collection of them in order."""
    if loaders is None:
        return []
    return list((loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened)


def _training_loader(trainer: Trainer) -> Any:
    """Return the training loader; None in the sanity check, which comes before it is made."""
    loaders = flat_loaders(trainer.train_dataloader)
    if not loaders and trainer.sanity_checking:
        return None
    if len(loaders) != 1:
        raise expected("reference", 'a loader, where there is not one training loader for "train"', f"{len(loaders)} of them")
    return loaders[0]


@contextmanager
def shown_progress(trainer: Trainer) -> Iterator[Progress | None]:
    """Yield the function that shows progress in the style of the Trainer's bar; None where it shows none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with progress_bar(position=2) as tell:
            yield tell
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        rich = bar.progress
        task = rich.add_task("netsim", total=1.0)
        try:
            yield lambda stage, done, total: rich.update(
                task, description=f"netsim {stage}", completed=done, total=total or float("inf")
            )
        finally:
            # Removing a task would shift the numbers by which the Trainer's bar finds its own.
            rich.update(task, visible=False)
    else:
        yield None
