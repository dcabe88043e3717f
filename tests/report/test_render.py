from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from lightning_netsim._checks import NetsimError
from lightning_netsim.report.pictures import check_thumbnail, find_normalize, to_image


def test_values_in_the_unit_interval_are_taken_as_they_are() -> None:
    image = to_image(torch.tensor([[[0.25, 0.5], [0.2, 0.4]]]))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, [[64, 128], [51, 102]])


def test_values_elsewhere_are_stretched_and_constant_ones_are_gray() -> None:
    np.testing.assert_array_equal(to_image(torch.tensor([[-3.0, 0.0, 3.0]] * 2)), [[0, 128, 255]] * 2)
    np.testing.assert_array_equal(to_image(torch.full((1, 2, 2), 7.0)), np.full((2, 2), 128))


def test_color_comes_last_whichever_way_round() -> None:
    color = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    image = to_image(color)
    assert image.shape == (4, 5, 3)
    np.testing.assert_array_equal(image[1, 2], np.rint(255 * color[:, 1, 2].numpy()))
    np.testing.assert_array_equal(to_image(color.permute(1, 2, 0).numpy().repeat(2, axis=0)), image.repeat(2, axis=0))


def test_other_numbers_of_channels() -> None:
    many = torch.rand(7, 4, 5, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(to_image(many), to_image(many[:3]))
    two = torch.tensor([0.2, 0.6]).view(2, 1, 1).expand(2, 4, 4)
    np.testing.assert_array_equal(to_image(two), np.full((4, 4), 102))


def test_the_middle_of_a_clip_is_shown() -> None:
    clip = torch.rand(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(to_image(clip), to_image(clip[:, 2]))


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


def test_bytes_stay_bytes_and_nan_is_no_trouble() -> None:
    raw = torch.tensor([[[0, 200], [3, 255]]], dtype=torch.uint8)
    np.testing.assert_array_equal(to_image(raw, ((0.5,), (0.5,))), raw[0])
    np.testing.assert_array_equal(to_image(raw.long()), raw[0])
    np.testing.assert_array_equal(to_image(torch.tensor([[float("nan"), 1.0]] * 2)), [[0, 255]] * 2)
    np.testing.assert_array_equal(to_image(torch.tensor([[True, False]] * 2)), [[255, 0]] * 2)


def test_half_precision_and_gradients_are_accepted() -> None:
    sample = torch.tensor([[0.0, 1.0]] * 2, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(to_image(sample), [[0, 255]] * 2)


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


class Normalize:
    def __init__(self, mean, std) -> None:
        self.mean, self.std = mean, std


def compose(*parts: object) -> SimpleNamespace:
    return SimpleNamespace(transforms=list(parts))


def test_normalize_is_found_within_transforms_and_wrappers() -> None:
    inner = compose(SimpleNamespace(size=3), Normalize([0.1, 0.2], torch.tensor([0.3, 0.4])))
    dataset = SimpleNamespace(transform=inner, transforms=SimpleNamespace(transform=inner))
    expected = ((0.1, 0.2), pytest.approx((0.3, 0.4)))
    assert find_normalize(dataset) == expected
    assert find_normalize(Subset(dataset, [0])) == expected
    assert find_normalize(ConcatDataset([[1], [2]])) is None
    both = SimpleNamespace(dataset=dataset, transform=Normalize((0.5,), (0.6,)))
    assert find_normalize(both) == ((0.5,), (0.6,))


def test_statistics_of_a_dataset_are_no_normalization() -> None:
    assert find_normalize(SimpleNamespace(mean=[0.5], std=[0.5], transform=None)) is None
    assert find_normalize([1, 2, 3]) is None


def test_normalize_of_torchvision_is_found() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    v2 = pytest.importorskip("torchvision.transforms.v2")
    for module in (transforms, v2):
        dataset = SimpleNamespace(transform=module.Compose([module.Normalize((0.1307,), (0.3081,))]))
        assert find_normalize(dataset) == ((0.1307,), (0.3081,))


def test_a_cycle_of_wrappers_ends() -> None:
    dataset = SimpleNamespace(transform=None)
    dataset.dataset = dataset
    assert find_normalize(dataset) is None


def test_a_thumbnail_of_another_kind_is_refused_with_the_remedy() -> None:
    with pytest.raises(NetsimError, match=r"shape \(3, 8, 8\), dtype float64.*to_image"):
        check_thumbnail("thumbnails(index)", np.zeros((3, 8, 8)))
    assert check_thumbnail("thumbnails(index)", "text") == "text"
