"""Show the progress of a measurement beside the Trainer's own bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_netsim.progress import Progress, progress_bar


@contextmanager
def shown_progress(trainer: Trainer) -> Iterator[Progress | None]:
    """Yield the function that shows progress in the style of the Trainer's bar; None where it shows none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        yield from _rich(bar)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with progress_bar(position=2) as tell:
            yield tell
    else:
        yield None


def _rich(bar: RichProgressBar) -> Iterator[Progress]:
    progress = bar.progress
    if progress is None:
        return
    task = progress.add_task("netsim", total=1.0)

    def tell(stage: str, done: int, total: int | None) -> None:
        progress.update(task, description=f"netsim {stage}", completed=done, total=total or float("inf"))

    try:
        yield tell
    finally:
        # Removing a task would shift the numbers by which the Trainer's bar finds its own.
        progress.update(task, visible=False)
