from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler

from lightning_netsim import NetsimError
from lightning_netsim.demos import DigitsDataModule, MNISTDataModule


@pytest.fixture
def digits() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=100)
    data.setup("fit")
    return data


def test_digits_are_images_in_the_unit_interval_with_int_labels(digits: DigitsDataModule) -> None:
    images, labels = digits.val_set.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)


def test_digits_split_keeps_the_share_of_each_class_and_every_image(digits: DigitsDataModule) -> None:
    train, val = (part.tensors[1].bincount(minlength=10) for part in (digits.train_set, digits.val_set))
    assert int((train + val).sum()) == 1797
    share = val / (train + val)
    assert share.sub(0.4).abs().max() < 0.01
    images = torch.cat([part.tensors[0] for part in (digits.train_set, digits.val_set)]).flatten(1)
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data).float() / 16
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, everything.tolist()))


def test_digits_split_depends_on_its_seed_alone(digits: DigitsDataModule) -> None:
    torch.manual_seed(123)
    again, other = DigitsDataModule(), DigitsDataModule(seed=1)
    for data in (again, other):
        data.setup("fit")
    assert torch.equal(digits.val_set.tensors[0], again.val_set.tensors[0])
    assert not torch.equal(digits.val_set.tensors[0], other.val_set.tensors[0])


def test_held_out_digits_come_in_order_and_training_digits_do_not(digits: DigitsDataModule) -> None:
    for loader in (digits.val_dataloader(), digits.test_dataloader(), digits.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
        assert torch.equal(torch.cat([images for images, _ in loader]), digits.val_set.tensors[0])
    assert not isinstance(digits.train_dataloader().sampler, SequentialSampler)


def test_digits_name_their_classes(digits: DigitsDataModule) -> None:
    assert digits.class_names == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize("arguments", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"batch_size": 0}])
def test_digits_refuse_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(NetsimError, match=next(iter(arguments))):
        DigitsDataModule(**arguments)  # type: ignore[arg-type]


def test_missing_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    data = MNISTDataModule(str(tmp_path))
    with pytest.raises(NetsimError, match="set `download: true`"):
        data.prepare_data()
    assert not list(tmp_path.iterdir()), "nothing is written where nothing was asked for"


def test_mnist_has_its_two_parts(data_dir: Path) -> None:
    data = MNISTDataModule(str(data_dir), batch_size=500)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (60_000, 10_000)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (500, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4], "the first test images, in the order of the file"
