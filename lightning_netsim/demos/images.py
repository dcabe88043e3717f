"""Serve handwritten digits: scikit-learn's, which need no download, and MNIST."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms.v2 import RandomAffine

from lightning_netsim._checks import check_choice, check_positive_int, expected
from lightning_netsim.analysis.rare_first import RareFirstSampler

CLASS_NAMES = [str(digit) for digit in range(10)]


class AbstractImageDataModule(LightningDataModule):
    """Serve (image, label) batches of two tensor data sets: one to train on, one that is held out.

    The held-out images serve test and prediction, and validation too unless it goes over the training images, always in the
    same order. A subclass loads both sets.
    """

    train_set: TensorDataset
    val_set: TensorDataset

    def __init__(self, batch_size: int, num_workers: int, counts: str | None, validate_on: str, num_views: int) -> None:
        super().__init__()
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.num_workers = num_workers
        self.counts = counts
        self.validate_on = check_choice("validate_on", validate_on, ("held_out", "train"))
        self.num_views = check_positive_int("num_views", num_views)
        self.train_sampler: RareFirstSampler | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of each label, in the order of the labels."""
        return CLASS_NAMES

    @abstractmethod
    def load_sets(self) -> tuple[TensorDataset, TensorDataset]:
        """Return the training images and the held-out images, with their labels."""

    def setup(self, stage: str) -> None:
        """Load both sets, and the counts by which the training images are drawn.

        Raises:
            NetsimError: if `counts` is no directory of a run, or its counts are not of the training images.
        """
        self.train_set, self.val_set = self.load_sets()
        if self.counts is not None:
            self.train_sampler = RareFirstSampler.from_record(self.counts, len(self.train_set))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images in `num_views`, shuffled, or with `counts` the rare ones first."""
        images = self.train_set if self.num_views == 1 else Views(self.train_set, self.num_views)
        if self.train_sampler is None:
            return self._loader(images, shuffle=True)
        if self.trainer is not None:
            # Workers begin to load before Lightning sets the epoch of a resumed fit.
            self.train_sampler.set_epoch(self.trainer.current_epoch)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # The wrapper that Lightning would put around the sampler shuffles the order.
            return self._loader(images, sampler=DistributedSamplerWrapper(self.train_sampler, shuffle=False))
        return self._loader(images, sampler=self.train_sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images of `validate_on`, in order."""
        return self._loader(self.val_set if self.validate_on == "held_out" else self.train_set)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images, in order."""
        return self._loader(self.val_set)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images, in order."""
        return self._loader(self.val_set)

    def _loader(
        self, images: Dataset[Any], shuffle: bool = False, sampler: Sampler[int] | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        keep_workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(images, batch_size=self.batch_size, shuffle=shuffle, sampler=sampler, **keep_workers)


class Views(Dataset[tuple[list[Tensor], Tensor]]):
    """Serve ([first view, second view, ...], label) of each image: the image shifted, turned and scaled at random.

    Args:
        images: images, shape (1, H, W), and their labels.
        num_views: how many of each.
    """

    def __init__(self, images: TensorDataset, num_views: int) -> None:
        self.images = images
        self.num_views = num_views
        self.transform = RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.85, 1.15))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        """Return the views of one image, and its label."""
        image, label = self.images[index]
        return [self.transform(image) for _ in range(self.num_views)], label


class DigitsDataModule(AbstractImageDataModule):
    """Serve scikit-learn's 1,797 handwritten digits, which come with its wheel.

    Images have shape (1, 8, 8) and values in [0, 1]. The split into training and validation images keeps the share of each
    class.

    Args:
        batch_size: images in a batch, >= 1.
        val_fraction: the share of the images that is held out, in (0, 1).
        seed: of the split.
        num_workers: processes that load batches; 0 loads them in the main process.
        counts: directory of a run or a record whose soft counts order the training images, rare ones first; see
            `RareFirstSampler`. None shuffles them.
        validate_on: which images validation goes over, and with it `SimilarityMonitor`: "held_out", or "train", which counts
            the training images so that a next run can draw by these counts.
        unseen_classes: digits that are held out as classes: all their images are, and no others, so that embeddings are
            judged on classes that training has not seen. None holds out images of every class.
        num_views: of each training image in a batch, randomly shifted, turned and scaled; 1 leaves the images as they are.

    Example:
        >>> data = DigitsDataModule(batch_size=4)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, len(data.train_set) + len(data.val_set)
        (torch.Size([4, 1, 8, 8]), 1797)
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.4,
        seed: int = 0,
        num_workers: int = 0,
        counts: str | None = None,
        validate_on: str = "held_out",
        unseen_classes: list[int] | None = None,
        num_views: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, counts, validate_on, num_views)
        if not 0 < val_fraction < 1:
            raise expected("val_fraction", "a number within (0, 1)", repr(val_fraction))
        if unseen_classes is not None and not 0 < len(set(unseen_classes) & set(range(10))) < 10:
            raise expected("unseen_classes", "some of the digits 0 to 9, but not all", repr(unseen_classes))
        self.unseen_classes = unseen_classes
        self.val_fraction = val_fraction
        self.seed = seed
        self.save_hyperparameters()

    def load_sets(self) -> tuple[TensorDataset, TensorDataset]:
        """Load the digits and split them."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        if self.unseen_classes is None:
            everything = range(len(digits.target))
            train, val = train_test_split(
                everything, test_size=self.val_fraction, random_state=self.seed, stratify=digits.target
            )
        else:
            unseen = np.isin(digits.target, self.unseen_classes)
            train, val = np.flatnonzero(~unseen), np.flatnonzero(unseen)
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(digits.target).long()
        # Sorted, so that an index in a table grows with the index in scikit-learn's own data set.
        train_set, val_set = (TensorDataset(images[chosen], labels[chosen]) for chosen in (sorted(train), sorted(val)))
        return train_set, val_set


class MNISTDataModule(AbstractImageDataModule):
    """Serve MNIST: the 60,000 training images, and the 10,000 test images, which are held out.

    Images have shape (1, 28, 28) and values in [0, 1].

    Args:
        data_dir: the directory that holds, or shall hold, `MNIST/raw`, as torchvision lays it out.
        batch_size: images in a batch, >= 1.
        download: fetch the four files (about 12 MB) if they are missing.
        num_workers: processes that load batches; 0 loads them in the main process.
        counts: directory of a run or a record whose soft counts order the training images, rare ones first; see
            `RareFirstSampler`. None shuffles them.
        validate_on: which images validation goes over, and with it `SimilarityMonitor`: "held_out", or "train", which counts
            the training images so that a next run can draw by these counts.
        num_views: of each training image in a batch, randomly shifted, turned and scaled; 1 leaves the images as they are.

    Example:
        >>> MNISTDataModule("nowhere").prepare_data()
        Traceback (most recent call last):
        lightning_netsim._checks.NetsimError: Expected `data_dir` to be a directory with MNIST/raw in it, but got 'nowhere'. ...
    """

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 64,
        download: bool = False,
        num_workers: int = 0,
        counts: str | None = None,
        validate_on: str = "held_out",
        num_views: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, counts, validate_on, num_views)
        self.data_dir = data_dir
        self.download = download
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Fetch MNIST if that was asked for.

        Raises:
            NetsimError: if the files are missing and `download` is False.
        """
        for train in (True, False):
            self._load(train, self.download)

    def load_sets(self) -> tuple[TensorDataset, TensorDataset]:
        """Load both parts of MNIST into memory."""
        return self._load(True, False), self._load(False, False)

    def _load(self, train: bool, download: bool) -> TensorDataset:
        try:
            mnist = MNIST(self.data_dir, train=train, download=download)
        except RuntimeError as error:
            remedy = "Give the directory where MNIST lies, or set `download: true` to fetch it (about 12 MB)."
            raise expected("data_dir", "a directory with MNIST/raw in it", repr(self.data_dir), remedy) from error
        return TensorDataset(mnist.data.unsqueeze(1).float() / 255, mnist.targets)
