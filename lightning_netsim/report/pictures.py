"""Show samples: the small copies that a measurement kept, as pictures or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_netsim.report.render import Thumbnail, find_normalize, to_image
from lightning_netsim.results import SampleSet, SimilarityResult

#: Position in the data set -> what a person sees.
Thumbnails = Callable[[int], Thumbnail]


class Pictures:
    """Thumbnails of the query and the reference samples of a measurement.

    Args:
        result: what was found; None shows nothing.
        dataset: the query data set: a torchvision `Normalize` in its transforms is undone.
        reference_dataset: likewise; None for the same.

    Attributes:
        queries: a position in the query set -> picture or text; None if there is nothing to show.
        reference: likewise for the reference set.
    """

    def __init__(self, result: SimilarityResult | None, dataset: Any, reference_dataset: Any = None) -> None:
        self.queries = None if result is None else thumbnails(result.queries, dataset)
        self.reference = self.queries
        if result is not None and not result.compares_with_itself:
            self.reference = thumbnails(result.reference, reference_dataset)


def thumbnails(samples: SampleSet, dataset: Any) -> Thumbnails | None:
    """Return the function from a position in a set to its picture or text; None if there is nothing to show.

    Args:
        samples: the set.
        dataset: where it comes from: a torchvision `Normalize` in its transforms is undone.
    """
    shown: Sequence[Any] | None = samples.shown
    if shown is None:
        return None
    rows = {position: row for row, position in enumerate(samples.index.tolist())}
    normalize = None if dataset is None else find_normalize(dataset)

    def thumbnail(position: int) -> Thumbnail:
        sample = shown[rows[position]]
        return sample if isinstance(sample, str) else to_image(sample, normalize)

    return thumbnail
