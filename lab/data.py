"""Data sets that several scripts read; where one is missing, the error says what has to be put where."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_netsim._checks import expected
from lightning_netsim.demos import DigitsDataModule, MNISTDataModule
from lightning_netsim.demos.photographs import find_photographs, read_photograph

Labeled = tuple[Tensor, Tensor]
"""Images and their labels."""


def read_mnist(data_dir: str | Path) -> tuple[Labeled, Labeled]:
    """Return the training and the test images, shape (N, 1, 28, 28), values in [0, 1], with labels."""
    train, test = (part.tensors for part in MNISTDataModule(str(data_dir)).load_sets())
    return (train[0], train[1]), (test[0], test[1])


def read_digits(val_fraction: float, seed: int = 0) -> tuple[Labeled, Labeled]:
    """Return training and held-out images of scikit-learn's digits, shape (N, 1, 8, 8), values in [0, 1], with labels."""
    train, held_out = (part.tensors for part in DigitsDataModule(val_fraction=val_fraction, seed=seed).load_sets())
    return (train[0], train[1]), (held_out[0], held_out[1])


def read_cifar(data_dir: str | Path, part: str) -> Labeled:
    """Return the images of "train" or "test" of the CIFAR-10 subset, shape (N, 3, 32, 32), uint8, with labels."""
    path = Path(data_dir, "cifar10", "cifar10_subset.npz")
    if not path.is_file():
        raise expected("data_dir", "a directory with cifar10/cifar10_subset.npz in it", repr(str(data_dir)))
    with np.load(path) as arrays:
        images, labels = torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"])
    return images.permute(0, 3, 1, 2).contiguous(), labels.long()


def read_omniglot(
    data_dir: str | Path, file: str, choose: Callable[[list[str]], Sequence[str]]
) -> tuple[Sequence[str], list[Image.Image]]:
    """Return drawings of Omniglot in shades of gray, black on white, and their names, "folder/alphabet/character/file.png".

    Args:
        data_dir: the directory with `omniglot/` in it.
        file: "images_background.zip" or "images_evaluation.zip".
        choose: which names of all, sorted.
    """
    path = Path(data_dir, "omniglot", file)
    if not path.is_file():
        remedy = f"Put {file} of https://github.com/brendenlake/omniglot (folder python) there."
        raise expected("data_dir", f"a directory with omniglot/{file} in it", repr(str(data_dir)), remedy)
    with zipfile.ZipFile(path) as archive:
        names = choose(sorted(name for name in archive.namelist() if name.endswith(".png")))
        return names, [Image.open(io.BytesIO(archive.read(name))).convert("L") for name in names]


def read_photographs(data_dir: str | Path) -> list[Tensor]:
    """Return the 24 photographs of the Kodak set in their order, each (3, H, W), colors in [0, 1]."""
    paths = [path for path in find_photographs(Path(data_dir, "kodak")) if path.name.startswith("kodim")]
    if len(paths) != 24:
        raise expected(
            "data_dir",
            "a directory with kodak/kodim01.png to kodak/kodim24.png in it",
            f"{str(data_dir)!r} with {len(paths)} of these files",
            "The Kodak Lossless True Color Image Suite has to be put there first.",
        )
    return [read_photograph(path).float() / 255 for path in paths]
