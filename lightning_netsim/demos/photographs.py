"""Serve photographs and what is left of them when they are reduced four times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, to_dtype

from lightning_netsim._checks import check_positive_int, check_seed, expected

SCALE = 4
"""How many times larger the sides of the output are."""

PhotographBatch = tuple[Tensor, Tensor]
"""Reduced photographs, shape (B, 3, H/4, W/4), and the photographs, shape (B, 3, H, W); values in [0, 1]."""


def downscale(images: Tensor) -> Tensor:
    """Return images reduced four times, by bicubic interpolation with antialiasing.

    Args:
        images: shape (B, C, H, W), values in [0, 1]; 4 divides H and W.

    Returns:
        Shape (B, C, H/4, W/4), values in [0, 1].
    """
    height, width = images.shape[-2:]
    return F.interpolate(images, (height // SCALE, width // SCALE), mode="bicubic", antialias=True).clamp(0, 1)


def upscale(images: Tensor) -> Tensor:
    """Return images, shape (B, C, H, W), enlarged four times by bicubic interpolation."""
    return F.interpolate(images, scale_factor=float(SCALE), mode="bicubic")


class PhotographDataModule(LightningDataModule):
    """Serve photographs and what is left of them when they are reduced four times.

    Training batches are random crops, reduced by bicubic interpolation with antialiasing. Validation, test and prediction go
    over the photographs that are held out, one by one and in full but for up to three rows and columns, so that 4 divides
    their sides. All are held in memory, three bytes for each pixel.

    Args:
        data_dir: directory of PNG and JPEG files of any size, of which some are held out. None takes the two photographs that
            come with scikit-learn, a flower and a Chinese temple: the left half of each for training, the right is held out.
        crop_size: sides of a crop, a multiple of 4; the paper has 128.
        batch_size: crops in a training batch, >= 1.
        crops_per_epoch: random crops that make an epoch, >= 1.
        val_fraction: the share of the photographs of `data_dir` that is held out, in (0, 1); at least one is.
        seed: of the choice of these.
        num_workers: processes that load batches; 0 loads them in the main process.

    Raises:
        ValueError: for a value out of range; in `setup`, if `data_dir` is no directory with two photographs or more, one
            cannot be read, or one for training is smaller than a crop.

    Example:
        >>> data = PhotographDataModule(crop_size=64, batch_size=4)
        >>> data.setup("fit")
        >>> low, high = next(iter(data.train_dataloader()))
        >>> low.shape, high.shape
        (torch.Size([4, 3, 16, 16]), torch.Size([4, 3, 64, 64]))
    """

    def __init__(
        self,
        data_dir: str | None = None,
        crop_size: int = 64,
        batch_size: int = 8,
        crops_per_epoch: int = 800,
        val_fraction: float = 0.25,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if check_positive_int("crop_size", crop_size) % SCALE:
            raise expected("crop_size", f"a multiple of {SCALE}", str(crop_size))
        if not 0 < val_fraction < 1:
            raise expected("val_fraction", "a number within (0, 1)", repr(val_fraction))
        self.data_dir = data_dir
        self.crop_size = crop_size
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.crops_per_epoch = check_positive_int("crops_per_epoch", crops_per_epoch)
        self.val_fraction = val_fraction
        self.seed = check_seed("seed", seed)
        self.num_workers = num_workers
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read the photographs."""
        train, held_out = _read_samples() if self.data_dir is None else self._read_directory(Path(self.data_dir))
        self.train_set = RandomCrops(train, self.crop_size, self.crops_per_epoch)
        self.val_set = WholePhotographs(held_out)

    def _read_directory(self, path: Path) -> tuple[list[Tensor], list[Tensor]]:
        files = find_photographs(path)
        if len(files) < 2:
            got = f"{str(path)!r} with {len(files)}" if path.is_dir() else f"{str(path)!r}, which is none"
            raise expected("data_dir", "a directory with at least two PNG or JPEG files", got)
        num_held_out = min(max(1, round(self.val_fraction * len(files))), len(files) - 1)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed)).tolist()
        train, held_out = (sorted(part) for part in (order[num_held_out:], order[:num_held_out]))
        photographs = [read_photograph(file) for file in files]
        for place in train:
            if min(photographs[place].shape[1:]) < self.crop_size:
                height, width = photographs[place].shape[1:]
                got = f"{files[place].name} of {height}×{width}"
                wanted = f"a directory with photographs of at least {self.crop_size}×{self.crop_size} pixels"
                raise expected("data_dir", wanted, got, "Choose a smaller `crop_size`, or other photographs.")
        return [photographs[place] for place in train], [photographs[place] for place in held_out]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return random crops."""
        return self._loader(self.train_set, self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out photographs, one by one: their sizes may differ."""
        return self._loader(self.val_set, 1)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out photographs."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out photographs."""
        return self.val_dataloader()

    def _loader(self, images: Dataset[Any], batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
        keep_workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(images, batch_size=batch_size, **keep_workers)


class RandomCrops(Dataset[PhotographBatch]):
    """Serve (reduced crop, crop) at random places of random photographs, anew at each call.

    Args:
        photographs: shape (3, H, W), uint8, none smaller than a crop.
        crop_size: sides of a crop, a multiple of 4.
        length: how many make an epoch.
    """

    def __init__(self, photographs: Sequence[Tensor], crop_size: int, length: int) -> None:
        self.photographs = photographs
        self.crop_size = crop_size
        self.length = length

    def __len__(self) -> int:
        """Return the number of crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> PhotographBatch:
        """Return one crop, whatever the index, from torch's random state."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        photograph = self.photographs[int(torch.randint(len(self.photographs), ()))]
        top, left = (int(torch.randint(side - self.crop_size + 1, ())) for side in photograph.shape[1:])
        return _pair(photograph[:, top : top + self.crop_size, left : left + self.crop_size])


class WholePhotographs(Dataset[PhotographBatch]):
    """Serve (reduced photograph, photograph), cropped so that 4 divides its sides.

    Args:
        photographs: shape (3, H, W), uint8.
    """

    def __init__(self, photographs: Sequence[Tensor]) -> None:
        self.photographs = photographs

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.photographs)

    def __getitem__(self, index: int) -> PhotographBatch:
        """Return one photograph."""
        photograph = self.photographs[index]
        return _pair(center_crop(photograph, [side // SCALE * SCALE for side in photograph.shape[1:]]))


def _pair(photograph: Tensor) -> PhotographBatch:
    high = to_dtype(photograph, torch.float32, scale=True)
    return downscale(high.unsqueeze(0)).squeeze(0), high


def find_photographs(path: Path) -> list[Path]:
    """Return the PNG and JPEG files of a directory by name; none where there is no directory."""
    files = path.iterdir() if path.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg"))


def read_photograph(file: Path) -> Tensor:
    """Return a PNG or JPEG file in color, shape (3, H, W), uint8.

    Raises:
        NetsimError: if it cannot be read.
    """
    try:
        photograph = pil_loader(str(file))
    except OSError as error:
        raise expected("data_dir", "a directory of readable PNG and JPEG files", f"{str(file)!r} ({error})") from error
    pixels: Tensor = pil_to_tensor(photograph)
    return pixels


def _read_samples() -> tuple[list[Tensor], list[Tensor]]:
    """Return the left halves of scikit-learn's photographs, and the right halves."""
    from sklearn.datasets import load_sample_image

    photographs = [torch.tensor(load_sample_image(name)).permute(2, 0, 1) for name in ("flower.jpg", "china.jpg")]
    left, right = zip(*(photograph.chunk(2, dim=2) for photograph in photographs), strict=True)
    return list(left), list(right)
