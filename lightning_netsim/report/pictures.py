"""Show samples: from what a measurement kept of them to pictures or text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.measurement.result import SampleSet, SimilarityResult

Image: TypeAlias = npt.NDArray[np.uint8]

Thumbnail: TypeAlias = "Image | str | None"

#: Position in the data set -> what a person sees.
Thumbnails: TypeAlias = Callable[[int], Thumbnail]

Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

_INK = (59, 111, 182)

_VECTOR_SIZE = (48, 64)  # height and width in pixels of the picture of a vector

_MAX_BARS = 32

_TOLERANCE = 0.05


def to_image(sample: object, normalize: Normalization | None = None) -> Thumbnail:
    """Turn a sample into an image, shape (H, W) or (H, W, 3), uint8; a text stays a text.

    An image is (C, H, W), (H, W, C) or (H, W). One channel is shown as gray, three in color, two by their mean, and of more
    than three the first three; of a volume or clip (C, T, H, W) the middle slice is shown. Pixel values: uint8 as they are;
    otherwise `normalize` is undone where that lands in [0, 1]; else values in [0, 1] are taken as they are; else the least
    value becomes black and the greatest white. A vector becomes a bar chart (up to 32 entries) or a line.

    Args:
        sample: a tensor, array, PIL image or string.
        normalize: the (mean, std) by channel that the data set subtracts and divides by, as `find_normalize` gives it.

    Returns:
        The image, the text, or None where there is nothing to see (a scalar, an integer vector such as token ids, an object
        of another kind).

    >>> to_image(torch.tensor([[[0.0, 1.0]]]))
    array([[  0, 255]], dtype=uint8)
    """
    if sample is None or isinstance(sample, str):
        return sample
    array = _as_array(sample)
    if array is None or array.size == 0 or array.ndim == 0:
        return None
    if array.ndim == 1:
        return None if array.dtype.kind in "iub" else _draw_vectors(array[None])
    if array.ndim == 2 and array.shape[1] > 16 * array.shape[0]:
        return _draw_vectors(array)  # a few long signals, not an image
    while array.ndim > 3:
        array = array[:, array.shape[1] // 2]
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] not in (1, 3, 4) or array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    image = _to_bytes(array, normalize)
    if image.shape[2] == 1:
        return image[:, :, 0]
    if image.shape[2] == 2:
        return np.asarray(np.rint(image.mean(axis=2)), dtype=np.uint8)
    return np.ascontiguousarray(image[:, :, :3])


def _as_array(sample: object) -> npt.NDArray[Any] | None:
    """Return `sample` as a numpy array of numbers, or None if it is not one."""
    if isinstance(sample, Tensor):
        sample = sample.detach().cpu()
        sample = sample.float().numpy() if sample.dtype in (torch.bfloat16, torch.float16) else sample.numpy()
    elif not hasattr(sample, "__array_interface__") and not isinstance(sample, np.ndarray):
        return None
    array = np.asarray(sample)
    return array if array.dtype.kind in "fiub" else None


def _to_bytes(image: npt.NDArray[Any], normalize: Normalization | None) -> Image:
    """Return the pixel values of an (H, W, C) image as uint8."""
    if image.dtype == np.uint8:
        return image
    whole = image.dtype.kind in "iu"
    values = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if whole and values.min() >= 0 and 1 < values.max() <= 255:
        return values.astype(np.uint8)
    undone = _undo(values, normalize)
    if undone is not None:
        values = undone
    elif values.min() < 0 or values.max() > 1:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    return np.asarray(np.rint(255 * values.clip(0, 1)), dtype=np.uint8)


def _undo(values: npt.NDArray[np.float64], normalize: Normalization | None) -> npt.NDArray[np.float64] | None:
    """Return values · std + mean, or None where the numbers of channels differ or the result is no image in [0, 1]."""
    if normalize is None:
        return None
    mean, std = np.asarray(normalize[0]), np.asarray(normalize[1])
    if len(mean) not in (1, values.shape[2]) or len(std) not in (1, values.shape[2]):
        return None
    undone = values * std + mean
    return undone if undone.min() >= -_TOLERANCE and undone.max() <= 1 + _TOLERANCE else None


def _draw_vectors(rows: npt.NDArray[Any]) -> Image:
    """Draw each row as a line, or a single short one as bars, on a common scale that contains 0 for bars."""
    rows = np.nan_to_num(rows.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    height, width = _VECTOR_SIZE
    bars = len(rows) == 1 and rows.shape[1] <= _MAX_BARS
    low = min(rows.min(), 0.0) if bars else rows.min()
    high = max(rows.max(), 0.0) if bars else rows.max()
    span = (high - low) or 1.0
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    columns = np.arange(2, width - 2)
    place = (columns - 2) / (width - 4) * rows.shape[1]
    for row in rows:
        values = row[place.astype(int)] if bars else np.interp(place, np.arange(len(row)), row)
        level = np.rint(2 + (high - values) / span * (height - 5)).astype(int)
        start = np.full_like(level, round(2 + high / span * (height - 5))) if bars else np.concatenate([level[:1], level[:-1]])
        gap = bars and rows.shape[1] > 1
        for i, column in enumerate(columns):
            if gap and int(place[i]) != int(place[max(i - 1, 0)]):
                continue  # one white column between bars
            top, bottom = sorted((start[i], level[i]))
            canvas[top : bottom + 1, column] = _INK
    return canvas


def find_normalize(dataset: object) -> Normalization | None:
    """Find the mean and standard deviation that a data set's transform normalizes images with.

    Walks `transform`, `transforms`, `dataset` (of a subset) and `datasets` (of a concatenation), and recognizes a
    normalization by its `mean` and `std`, so that torchvision (both versions) need not be imported.

    Returns:
        (mean, std), each with one number for each channel, of the last normalization applied; None if there is none.

    >>> from types import SimpleNamespace
    >>> find_normalize(SimpleNamespace(transform=SimpleNamespace(mean=[0.5], std=[0.25])))
    ((0.5,), (0.25,))
    """
    found = list(_normalizations(dataset, is_transform=False, seen=set()))
    return found[-1] if found else None


def _normalizations(part: object, is_transform: bool, seen: set[int]) -> Iterator[Normalization]:
    """Yield the normalizations within a data set or transform, in the order in which they are applied."""
    if part is None or isinstance(part, (str, bytes, Tensor, np.ndarray)) or id(part) in seen:
        return
    seen.add(id(part))
    if is_transform:
        mean, std = _numbers(getattr(part, "mean", None)), _numbers(getattr(part, "std", None))
        if mean and std:
            yield mean, std
    for name in ("dataset", "transform", "transforms"):
        yield from _each(getattr(part, name, None), is_transform or name != "dataset", seen)
    datasets = getattr(part, "datasets", None)
    if not is_transform and isinstance(datasets, Sequence) and datasets:
        yield from _normalizations(datasets[0], False, seen)
    if is_transform and isinstance(part, torch.nn.Sequential):
        yield from _each(list(part), True, seen)


def _each(part: object, is_transform: bool, seen: set[int]) -> Iterator[Normalization]:
    parts = part if isinstance(part, (list, tuple)) else [part]
    for item in parts:
        yield from _normalizations(item, is_transform, seen)


def _numbers(value: object) -> tuple[float, ...]:
    """Return a number, sequence or tensor as a tuple of floats; anything else as an empty one."""
    if isinstance(value, Tensor):
        return tuple(float(number) for number in value.flatten())
    if isinstance(value, (int, float)):
        return (float(value),)
    if isinstance(value, (list, tuple)) and all(isinstance(number, (int, float)) for number in value):
        return tuple(float(number) for number in value)
    return ()


def check_thumbnail(name: str, value: object) -> Thumbnail:
    """Return `value` if it is an image, shape (H, W) or (H, W, 3), uint8, a text or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and (value.ndim == 2 or value.shape[2:] == (3,)):
        return value
    got = f"shape {value.shape}, dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise expected(name, "a uint8 array of shape (H, W) or (H, W, 3), a text or None", got, "`to_image` makes one of a sample.")


def thumbnail_of(thumbnails: Thumbnails | None, index: int) -> Thumbnail:
    """Return what a person sees of the sample of an index, checked; None where nothing can be seen."""
    return None if thumbnails is None else check_thumbnail("thumbnails(index)", thumbnails(index))


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
