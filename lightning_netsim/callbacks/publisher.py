"""Put what a measurement found where people look: tables and figures on disk, pictures in loggers, a summary to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_netsim.records.record import Record, prune_records, record_directory, write_record
from lightning_netsim.report.figures import (
    Figure,
    figure_to_array,
    plot_count_histogram,
    plot_counts_over_epochs,
    plot_neighbor_rows,
    save_figure,
)
from lightning_netsim.report.pictures import Pictures
from lightning_netsim.report.summary import format_summary


class Publisher:
    """Write records below a directory and show their figures.

    Args:
        root: the directory of the records; None writes nothing.
        keep: "all" records, the "last" one, or the "best" one.
        figures: whether to draw figures.
    """

    def __init__(self, root: Path | None, keep: str, figures: bool) -> None:
        self.root = root
        self._keep = keep
        self._figures = figures

    def publish(
        self, record: Record, pictures: Pictures, history: Sequence[Mapping[str, float]], loggers: Sequence[Logger], step: int
    ) -> Path | None:
        """Write the tables of a record, then its figures; return where."""
        path = None
        if self.root is not None:
            path = write_record(record_directory(self.root, record.meta["epoch"], record.meta["global_step"]), record)
        for name, figure in self._draw(record, pictures, history).items() if self._figures else ():
            if path is not None:
                save_figure(figure, path / f"{name}.png")
            for logger in loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"netsim/{name}", figure_to_array(figure), step, dataformats="HWC")
                elif hasattr(logger, "log_image"):
                    logger.log_image(key=f"netsim/{name}", images=[figure_to_array(figure)], step=step)
        if path is not None and self._keep == "last":
            prune_records(path.parent, {path})
        return path

    def keep_best(self, best: Path) -> None:
        """Remove all records of this run but the best one, which a run that was resumed may have written elsewhere."""
        if self.root is not None:
            prune_records(self.root, {best})

    def _draw(self, record: Record, pictures: Pictures, history: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
        drawn = {
            "counts": plot_count_histogram(record, pictures.queries),
            "neighbors": plot_neighbor_rows(record, pictures.queries, reference_thumbnails=pictures.reference),
        }
        if len(history) > 1:
            drawn["counts_over_epochs"] = plot_counts_over_epochs(history)
        return drawn


def print_summary(trainer: Trainer, record: Record, path: Path | None) -> None:
    """Print the summary of a record once, on the first process."""
    if trainer.is_global_zero:
        print(f"\n{format_summary(record, path)}")
