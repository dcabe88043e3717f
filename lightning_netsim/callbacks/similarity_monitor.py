"""Measure input similarity after every validation epoch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_netsim._checks import check_choice, check_positive_int, check_positive_number, check_writable, expected
from lightning_netsim.callbacks.epoch import EpochMeasurement
from lightning_netsim.callbacks.publisher import Publisher, print_summary
from lightning_netsim.measurement.progress import between_bars
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings, takes_settings
from lightning_netsim.records.record import RECORDS, Record, read_record
from lightning_netsim.records.tables import make_record, scalars
from lightning_netsim.records.view import RecordView
from lightning_netsim.report.pictures import Pictures

KEEP = ("all", "last", "best")
#: Strategies that leave no process with the whole model.
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


@takes_settings()
class SimilarityMonitor(Callback):
    """Show, after every validation epoch, which samples the network treats as the same thing.

    For every validation sample x: the soft neighbor count N_S(x) = Σ_j k(x, x_j), and its k nearest neighbors; k(x, x') is
    the normalized inner product of the gradients of the outputs with respect to the parameters: near 1 when every small change
    of the weights that moves one output moves the other alike.

    The run is as it would have been without the monitor: weights, gradients, random numbers, buffers, metrics and logged values
    are left alone. Tables go to ``<log_dir>/netsim/epoch=E-step=S/`` (samples.parquet, neighbors.parquet, meta.json and
    figures), those of `trainer.test` to ``<log_dir>/netsim/test/``; scalars are logged as ``netsim/neighbor_fraction``,
    ``netsim/same_class_fraction``, ``netsim/recall`` and ``netsim/left_out``; figures go to loggers that show images.

    What is compared: `similarity_step(batch, batch_idx) -> SimilarityBatch` if the LightningModule defines it. Otherwise a
    batch is (inputs, labels, ...), or a mapping whose label and id keys are taken out, and of what `forward` returns, `logits`
    or the only (B, D) tensor. Compare logits, not probabilities.

    Args:
        reference: what the neighbors are sought in: None for the validation set itself, "train" for the training set, or a
            loader.
        every_n_epochs: measure after every n-th epoch only.
        max_overhead: skip epochs so that measuring takes at most this share of the time of the fit, e.g. 0.1.
        keep: which records stay on disk: "all", the "last", or the "best" by `monitor`.
        monitor: the logged metric that says which record is best.
        mode: whether the best has the "min" or "max" of it.
        dirpath: where the records go; None for ``<log_dir>/netsim``.
        figures: whether to draw figures.
        summary: whether to print a summary at the end.
        **settings: see `SweepSettings`.

    Raises:
        ValueError: for a value out of range; before training for a strategy that shards the model, a directory that cannot be
            written, k ≥ N, or a batch or model that cannot be compared.

    Source: Charpiat et al., Input Similarity from the Neural Network Perspective, NeurIPS 2019.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SimilarityMonitor(k=10, every_n_epochs=5)], logger=False)
    """

    log: Callable[..., None]  # Set by the Trainer.

    def __init__(
        self,
        k: int = SweepSettings.k,
        *,
        reference: str | Iterable[Any] | None = None,
        every_n_epochs: int = 1,
        max_overhead: float | None = None,
        keep: str = "all",
        monitor: str | None = None,
        mode: str = "min",
        dirpath: str | os.PathLike[str] | None = None,
        figures: bool = True,
        summary: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = SweepSettings(k=k, **settings)
        if isinstance(reference, str):
            check_choice("reference", reference, ("train",))
        self.reference = reference
        self.every_n_epochs = check_positive_int("every_n_epochs", every_n_epochs)
        self.max_overhead = None if max_overhead is None else check_positive_number("max_overhead", max_overhead)
        self.keep = check_choice("keep", keep, KEEP)
        self.monitor, self.mode = monitor, check_choice("mode", mode, ("min", "max"))
        if keep == "best" and monitor is None:
            raise expected("monitor", 'the name of a logged metric for keep="best"', "None", 'For example monitor="val_loss".')
        self.dirpath, self.figures, self.summary = dirpath, figures, summary
        self.record: Record | None = None
        self.result: SimilarityResult | None = None
        self.history: list[dict[str, float]] = []
        self._best: tuple[float, str] | None = None
        self._path: Path | None = None
        self._epoch: EpochMeasurement | None = None
        self._scalars: dict[str, float] = {}
        self._noted: set[str] = set()
        self._announced = False
        self._spent = self._last_cost = 0.0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the history of counts, so that a resumed run goes on with it."""
        best = None if self._best is None else {"value": self._best[0], "path": self._best[1]}
        return {"history": [dict(row) for row in self.history], "best": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a run that is resumed."""
        self.history = [dict(row) for row in state_dict["history"]]
        best = state_dict["best"]
        self._best = None if best is None else (best["value"], best["path"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be supported, before anything runs."""
        name = type(trainer.strategy).__name__
        if any(sharded in name for sharded in _SHARDED):
            remedy = 'Use strategy="ddp" or a single device.'
            raise expected("strategy", "one that keeps the whole model in each process", name, remedy)
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise expected("model", "a module with at least one trainable parameter", "none")
        if self.reference == "train" and stage != "fit":
            wanted = f"a loader or None in `{getattr(stage, 'value', stage)}`"
            raise expected("reference", wanted, '"train"', "Pass the training loader itself.")
        self._publisher = Publisher(self._root(trainer), self.keep, self.figures)
        if self._publisher.root is not None and trainer.is_global_zero:
            check_writable("dirpath", self._publisher.root)
        self._started, self._spent = time.perf_counter(), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the first step, what the sanity check could not know, or what it would have if there were one."""
        if trainer.val_dataloaders is not None:
            self._see_loaders(trainer, pl_module)
        elif not trainer.enable_validation:
            rank_zero_warn("SimilarityMonitor: there is no validation, so nothing is measured.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scalars = {}
        due = trainer.sanity_checking or self._is_due(trainer)
        self._epoch = self._see_loaders(trainer, pl_module) if due else None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._epoch is None:
            return
        if not trainer.sanity_checking:
            self._epoch.see(batch, batch_idx, dataloader_idx)
        elif batch_idx == 0:
            self._epoch.check(batch, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._epoch is not None and not trainer.sanity_checking and self._epoch.is_last(batch_idx, dataloader_idx):
            self._measure(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch is not None and not trainer.sanity_checking:
            self._measure(trainer)
        for name, value in self._scalars.items():
            # Every process holds the same values.
            self.log(f"netsim/{name}", value, rank_zero_only=False, sync_dist=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.keep == "best" and self._path is not None and not trainer.sanity_checking:
            self._keep_best(trainer)
        if trainer.state.fn == "validate":
            self._print_summary(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_summary(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_summary(trainer)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _root(self, trainer: Trainer) -> Path | None:
        """Return the directory of the records; None in a `fast_dev_run`, which leaves nothing behind."""
        log_dir = trainer.log_dir  # Every process has to ask: it is a broadcast.
        if getattr(trainer, "fast_dev_run", False):
            return None
        if self.dirpath is not None:
            root = Path(self.dirpath)
        elif log_dir is not None:
            root = Path(log_dir) / RECORDS
        else:
            return None
        # The same epoch and step may be validated and tested; one must not replace the other.
        return root / "test" if trainer.state.fn == "test" else root

    def _see_loaders(self, trainer: Trainer, pl_module: LightningModule) -> EpochMeasurement:
        return EpochMeasurement(trainer, pl_module, self.settings, self.reference)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit":
            return True
        elapsed = time.perf_counter() - self._started
        allowed = math.inf if self.max_overhead is None or not self.history else self.max_overhead * elapsed
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._spent + self._last_cost <= allowed
        # Clocks differ between processes; the decision must not.
        return bool(trainer.strategy.broadcast(due))

    def _measure(self, trainer: Trainer) -> None:
        """Measure with all processes; the first one writes the record."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            start = time.perf_counter()
            result, pictures = epoch.measure(None if self._announced else _announce)
            self._announced = True
            if trainer.is_global_zero:
                self._take(trainer, epoch, result, pictures)
            self._last_cost = time.perf_counter() - start
            self._spent += self._last_cost
        self._scalars = trainer.strategy.broadcast(self._scalars)

    def _take(self, trainer: Trainer, epoch: EpochMeasurement, result: SimilarityResult, pictures: Pictures) -> None:
        """Turn a result into a record, write it, and remember what is shown later."""
        for note in set(result.notes) - self._noted:
            rank_zero_warn(f"SimilarityMonitor: {note}")
        self._noted |= set(result.notes)
        averaged = any(isinstance(callback, WeightAveraging) for callback in getattr(trainer, "callbacks", []))
        owners = [
            (getattr(trainer, "datamodule", None), "class_names"),
            (getattr(epoch.loaders[0], "dataset", None), "classes"),
        ]
        names = next(filter(None, [self.settings.class_names, *(getattr(owner, name, None) for owner, name in owners)]), None)
        context = {
            "stage": trainer.state.stage.value if trainer.state.stage else None,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "reference": "self" if self.reference is None else self.reference if isinstance(self.reference, str) else "other",
            "weights": "averaged" if averaged else "raw",
            "class_names": None if names is None else [str(name) for name in names],
        }
        self.result, self.record = result, make_record(result, self.settings, context)
        self._scalars = scalars(self.record)
        if trainer.state.fn == "fit":
            self.history.append(RecordView(self.record).history_row())
        self._path = self._publisher.publish(self.record, pictures, self.history, trainer.loggers, trainer.global_step)

    def _keep_best(self, trainer: Trainer) -> None:
        """Keep the record of the best validation so far only."""
        values = trainer.callback_metrics
        if self.monitor not in values:
            raise expected("monitor", "a logged metric: " + ", ".join(sorted(values)), repr(self.monitor))
        value = float(values[self.monitor])
        sign = 1 if self.mode == "min" else -1
        if self._best is None or math.isnan(self._best[0]) or sign * value < sign * self._best[0]:
            self._best = (value, str(self._path))
        if self._best is not None and trainer.is_global_zero:
            self._publisher.keep_best(Path(self._best[1]))

    def _print_summary(self, trainer: Trainer) -> None:
        if self.summary and self.record is not None:
            kept = self._best if self.keep == "best" and self._path is not None else None
            record, path = (self.record, self._path) if kept is None else (read_record(kept[1]), Path(kept[1]))
            print_summary(trainer, record, path)


def _announce(text: str) -> None:
    with between_bars():
        rank_zero_info(f"SimilarityMonitor: {text}")
