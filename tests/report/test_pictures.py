"""Samples become pictures or text; those of a measurement are found by position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from lightning_netsim._checks import NetsimError
from lightning_netsim.measurement.result import SampleSet
from lightning_netsim.report.pictures import Pictures, check_thumbnail, find_normalize, to_image

NAN = float("nan")


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        (torch.tensor([[[0.25, 0.5], [0.2, 0.4]]]), [[64, 128], [51, 102]]),  # as they are
        (torch.tensor([[-3.0, 0.0, 3.0]] * 2), [[0, 128, 255]] * 2),  # stretched
        (torch.tensor([[1.0, 2.0, 3.0]] * 2), [[0, 128, 255]] * 2),
        (torch.full((1, 2, 2), 7.0), [[128, 128]] * 2),
        (torch.tensor([0.2, 0.6]).view(2, 1, 1).expand(2, 4, 4), [[102] * 4] * 4),  # the mean of two channels
        (torch.tensor([[[0, 200], [3, 255]]], dtype=torch.uint8), [[0, 200], [3, 255]]),
        (torch.tensor([[[0, 200], [3, 255]]]), [[0, 200], [3, 255]]),
        (torch.tensor([[NAN, 1.0]] * 2), [[0, 255]] * 2),
        (torch.tensor([[True, False]] * 2), [[255, 0]] * 2),
        (torch.tensor([[0.0, 1.0]] * 2, dtype=torch.bfloat16, requires_grad=True), [[0, 255]] * 2),
    ],
)
def test_pixel_values(sample: torch.Tensor, wanted: list[list[int]]) -> None:
    image = to_image(sample)
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, wanted)


def test_of_many_channels_the_first_and_of_a_clip_the_middle_is_shown() -> None:
    clip = torch.rand(7, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(to_image(clip), to_image(clip[:3, 2]))


def test_color_comes_last_whichever_way_round() -> None:
    color = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    image = to_image(color)
    assert image.shape == (4, 5, 3)
    np.testing.assert_array_equal(image[1, 2], np.rint(255 * color[:, 1, 2].numpy()))
    np.testing.assert_array_equal(to_image(color.permute(1, 2, 0).numpy().repeat(2, axis=0)), image.repeat(2, axis=0))


def test_a_normalization_is_undone() -> None:
    pixels = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    np.testing.assert_array_equal(to_image(normalized, (mean, std)), to_image(pixels))
    assert not np.array_equal(to_image(normalized), to_image(pixels))


@pytest.mark.parametrize("normalize", [((0.5, 0.5), (0.5, 0.5)), ((10.0,), (3.0,))])
def test_a_normalization_that_does_not_fit_is_not_undone(normalize) -> None:
    sample = torch.linspace(-2, 2, 27).view(3, 3, 3)
    np.testing.assert_array_equal(to_image(sample, normalize), to_image(sample))


def test_a_vector_becomes_bars_with_the_greatest_entry_highest() -> None:
    image = to_image(torch.tensor([1.0, 4.0, 2.0]))
    ink = (image != 255).any(axis=2)
    first, second, third = (ink[:, columns].any(axis=1).sum() for columns in (slice(2, 20), slice(24, 40), slice(44, 62)))
    assert second > third > first > 0
    below = (to_image(torch.tensor([1.0, -1.0])) != 255).any(axis=2)
    assert below[:20, :30].any()
    assert not below[:20, 34:].any()
    assert below[30:, 34:].any()


def test_a_long_vector_becomes_a_line() -> None:
    image = to_image(torch.sin(torch.linspace(0, 6.28, 500)))
    ink = (image != 255).any(axis=2)
    assert ink[:, 2:-2].any(axis=0).all()
    assert ink.mean() < 0.15


def test_texts_stay_and_what_cannot_be_seen_is_none() -> None:
    assert to_image("a text") == "a text"
    for nothing in (None, torch.tensor(3.0), torch.tensor([101, 2023, 102]), torch.empty(0), {"a": 1}, [1, 2]):
        assert to_image(nothing) is None


def test_normalize_is_found_within_transforms_and_wrappers() -> None:
    def normalize(mean: Any, std: Any) -> Any:
        return SimpleNamespace(mean=mean, std=std)

    inner = SimpleNamespace(transforms=[SimpleNamespace(size=3), normalize([0.1, 0.2], torch.tensor([0.3, 0.4]))])
    dataset = SimpleNamespace(transform=inner, transforms=SimpleNamespace(transform=inner))
    expected = ((0.1, 0.2), pytest.approx((0.3, 0.4)))
    assert find_normalize(dataset) == expected
    assert find_normalize(Subset(dataset, [0])) == expected
    assert find_normalize(SimpleNamespace(dataset=dataset, transform=normalize((0.5,), (0.6,)))) == ((0.5,), (0.6,))
    cycle = SimpleNamespace(mean=[0.5], std=[0.5], transform=None)  # of the data set itself, which is no transform
    cycle.dataset = cycle
    for none in (cycle, [1, 2, 3], ConcatDataset([[1], [2]])):
        assert find_normalize(none) is None
    v2 = pytest.importorskip("torchvision.transforms.v2")
    assert find_normalize(SimpleNamespace(transform=v2.Compose([v2.Normalize((0.1,), (0.3,))]))) == ((0.1,), (0.3,))


def test_a_thumbnail_of_another_kind_is_refused_with_the_remedy() -> None:
    with pytest.raises(NetsimError, match=r"shape \(3, 8, 8\), dtype float64.*to_image"):
        check_thumbnail("thumbnails(index)", np.zeros((3, 8, 8)))


def sample_set(index: list[int], shown: list[Any] | None) -> SampleSet:
    return SampleSet(torch.tensor(index), None, None, torch.zeros(len(index), dtype=torch.int64), shown)


def result(queries: SampleSet, reference: SampleSet | None = None) -> Any:
    return SimpleNamespace(
        queries=queries, reference=reference or queries, compares_with_itself=reference is None or reference is queries
    )


def level(value: float) -> torch.Tensor:
    return torch.full((1, 2, 2), value)


def test_samples_are_found_by_their_position_in_the_data_set() -> None:
    pictures = Pictures(result(sample_set([4, 9], [level(0.0), level(1.0)])), None)
    assert pictures.queries is not None
    assert np.array_equal(pictures.queries(9), np.full((2, 2), 255))
    assert np.array_equal(pictures.queries(4), np.zeros((2, 2)))
    assert pictures.reference is pictures.queries


def test_each_set_has_its_own_normalization() -> None:
    def dataset(mean: float) -> Any:
        return SimpleNamespace(transform=SimpleNamespace(mean=[mean], std=[1.0]))

    queries, reference = sample_set([0], [level(-0.5)]), sample_set([0], [level(-0.2)])
    pictures = Pictures(result(queries, reference), dataset(0.5), dataset(1.0))
    assert pictures.queries is not None
    assert pictures.reference is not None
    assert np.array_equal(pictures.queries(0), np.zeros((2, 2)))
    assert np.array_equal(pictures.reference(0), np.full((2, 2), 204))


def test_a_set_without_samples_to_show_has_no_pictures() -> None:
    assert Pictures(None, None).queries is None
    pictures = Pictures(result(sample_set([0], None), sample_set([0], ["x"])), None)
    assert pictures.queries is None
    assert pictures.reference is not None
    assert pictures.reference(0) == "x"
