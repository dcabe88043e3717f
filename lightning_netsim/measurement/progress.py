"""Show how far a measurement is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

#: Called with what is done, the number of samples done, and the number in all or None, as the work goes on.
Progress = Callable[[str, int, int | None], None]


@contextmanager
def progress_bar(position: int = 0) -> Iterator[Progress]:
    """Yield the function that moves a progress bar, `position` lines below others; the bar is gone afterwards."""
    with tqdm(unit=" samples", leave=False, position=position, dynamic_ncols=True) as bar:

        def tell(stage: str, done: int, total: int | None) -> None:
            if bar.desc != f"netsim {stage}: ":
                bar.set_description(f"netsim {stage}", refresh=False)
                bar.reset(total)
            bar.update(done - bar.n)

        yield tell


@contextmanager
def between_bars() -> Iterator[None]:
    """Take the bars off the screen for the time of the block, so that a message has a line of its own."""
    with tqdm.external_write_mode():
        yield
