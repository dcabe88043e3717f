"""Show the progress of a measurement beside the Trainer's own bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm

from lightning_netsim.sweeps import Progress


@contextmanager
def shown_progress(trainer: Trainer) -> Iterator[Progress | None]:
    """Yield the function that shows progress in the style of the Trainer's bar; None where it shows none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        yield from _rich(bar)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        yield from _tqdm()
    else:
        yield None


def _tqdm() -> Iterator[Progress]:
    with tqdm(unit=" samples", leave=False, position=2, dynamic_ncols=True) as bar:

        def tell(stage: str, done: int, total: int | None) -> None:
            if bar.desc != f"netsim {stage}: ":
                bar.set_description(f"netsim {stage}", refresh=False)
                bar.reset(total)
            bar.update(done - bar.n)

        yield tell


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
