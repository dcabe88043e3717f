"""Data sets with planted near-duplicates, leaks and outliers, networks that know the rest, and what cleanlab finds there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from cleanlab import Datalab
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from lab.networks import load_resnet20
from lightning_netsim._checks import expected
from lightning_netsim.demos import DigitsDataModule, DigitsNetwork, MNISTDataModule, MNISTNetwork
from lightning_netsim.demos.photographs import find_photographs, read_photograph

Array = npt.NDArray[Any]

DATA = ("mnist", "cifar10", "digits")
NOISE = 0.02
# Of every photograph, a crop four times as wide as the images is reduced to their size.
REDUCED = 4
KNOWN = 10_000
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image moved by one pixel, up, down, left or right; the edge is repeated."""
    down, right = ((0, 1), (1, 0), (2, 1), (1, 2))[int(torch.randint(4, (), generator=generator))]
    padded = F.pad(image.unsqueeze(0), (1, 1, 1, 1), mode="replicate").squeeze(0)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image with Gaussian noise, five gray levels of 255 strong."""
    return (image + NOISE * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def recoded(image: Tensor, quality: int) -> Tensor:
    """Return an image that was written as JPEG and read again."""
    file = io.BytesIO()
    to_pil_image((image * 255).round().to(torch.uint8)).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file)).float() / 255


#: What makes a near-duplicate of an image, shape (C, H, W), values in [0, 1].
KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "shift": shifted,
    "noise": noisy,
    "jpeg 90": lambda image, _: recoded(image, 90),
    "jpeg 75": lambda image, _: recoded(image, 75),
}
# Originals of a set have these copies, one of each.
SET = ("shift", "noise", "jpeg 90")


@dataclass(frozen=True)
class Planted:
    """A data set with near-duplicates.

    Attributes:
        images: shape (N, C, H, W), values in [0, 1]: originals first, then copies.
        origin: shape (N,), for each image the place of the original; its own for an original.
        kind: N kinds: of a copy and of its original what was done to it, "set" where there are several copies, else "".
    """

    images: Tensor
    origin: Array
    kind: Array

    @classmethod
    def among(cls, images: Tensor, per_kind: int, sets: int, generator: torch.Generator) -> Planted:
        """Copy `per_kind` of the images by each kind, and `sets` others by three kinds each."""
        plan = [(kind, (kind,)) for kind in KINDS for _ in range(per_kind)] + [("set", SET)] * sets
        kind, origin, copies = np.full(len(images), "", dtype=object), list(range(len(images))), []
        copied = []
        for place, (name, changes) in zip(torch.randperm(len(images), generator=generator).tolist(), plan, strict=False):
            kind[place] = name
            for change in changes:
                copies.append(KINDS[change](images[place], generator))
                origin.append(place)
                copied.append(name)
        everything = torch.cat([images, torch.stack(copies)])
        return cls(everything, np.array(origin), np.concatenate([kind, np.array(copied, dtype=object)]))


@dataclass
class Problem:
    """A data set and a network, drawn and trained by one seed.

    Args:
        name: "mnist", "cifar10" or "digits".
        data_dir: the directory with MNIST/raw, cifar10, weights, omniglot and kodak in it.
        seed: of weights and draws.
        steps: of training, where the network is trained here.
    """

    name: str
    data_dir: str
    seed: int
    steps: int

    def generator(self, purpose: int) -> torch.Generator:
        """Return a generator of random numbers of its own for each purpose."""
        return torch.Generator().manual_seed(1000 * self.seed + purpose)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images that the network has learned from, their labels, and images that it has not seen."""
        if self.name == "cifar10":
            path = Path(self.data_dir) / "cifar10" / "cifar10_subset.npz"
            if not path.is_file():
                raise expected("data_dir", "a directory with cifar10/cifar10_subset.npz in it", repr(self.data_dir))
            with np.load(path) as arrays:
                known, other = (torch.from_numpy(arrays[name]).permute(0, 3, 1, 2) / 255 for name in ("x_train", "x_test"))
                # The first 2,000 training images served to choose the rule and its threshold.
                return known[2000:], torch.from_numpy(arrays["y_train"][2000:]).long(), other
        module = DigitsDataModule(val_fraction=1 / 3) if self.name == "digits" else MNISTDataModule(self.data_dir)
        known, other = (part.tensors for part in module.load_sets())
        return known[0][-KNOWN:], known[1][-KNOWN:], other[0]

    @cached_property
    def network(self) -> nn.Module:
        """Return the network, which takes images with values in [0, 1]."""
        if self.name == "cifar10":
            path = Path(self.data_dir) / "weights" / "resnet20-12fca82f.th"
            if not path.is_file():
                raise expected("data_dir", "a directory with weights/resnet20-12fca82f.th in it", repr(self.data_dir))
            return nn.Sequential(Standardized(), load_resnet20(self.data_dir)).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._train(DigitsNetwork() if self.name == "digits" else MNISTNetwork())

    def _train(self, network: nn.Module) -> nn.Module:
        images, labels, _ = self.images
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(self.steps):
            chosen = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        optimizer.zero_grad()
        return network.eval()

    def draw(self, known: bool, number: int) -> Tensor:
        """Return images, drawn at random, that the network has learned from, or has not."""
        images = self.images[0 if known else 2]
        return images[torch.randperm(len(images), generator=self.generator(1 if known else 2))[:number]]

    def strangers(self, number: int) -> dict[str, Tensor]:
        """Return images of other kinds: so many handwritten characters, photographs, and images of noise."""
        generator, (channels, _, side) = self.generator(3), self.images[0].shape[1:]
        if self.name == "cifar10":
            digits = MNISTDataModule(self.data_dir).load_sets()[1].tensors[0]
            chosen = torch.randperm(len(digits), generator=generator)[:number]
            characters = F.pad(digits[chosen], (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        else:
            characters = read_characters(self.data_dir, number, side, generator)
        photographs = read_crops(self.data_dir, number, side, generator)
        return {
            "characters": characters,
            "photographs": photographs.mean(1, keepdim=True) if channels == 1 else photographs,
            "noise": torch.rand(number, channels, side, side, generator=generator),
        }


class Standardized(nn.Module):
    """Standardize colors as the published weights want them."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)


def read_characters(data_dir: str, number: int, side: int, generator: torch.Generator) -> Tensor:
    """Return characters of Omniglot, white on black, shape (number, 1, side, side)."""
    path = Path(data_dir) / "omniglot" / "images_background.zip"
    if not path.is_file():
        raise expected("data_dir", "a directory with omniglot/images_background.zip in it", repr(data_dir))
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        chosen = [names[place] for place in torch.randperm(len(names), generator=generator)[:number].tolist()]
        drawings = [Image.open(io.BytesIO(archive.read(name))).convert("L") for name in chosen]
    pixels = torch.stack([1 - torch.from_numpy(np.array(drawing)).float() / 255 for drawing in drawings]).unsqueeze(1)
    reduced = F.interpolate(pixels, size=(side, side), mode="area")
    # The thin pen strokes are grey after that: make them as bright as those of digits.
    return reduced / reduced.amax((2, 3), keepdim=True)


def read_crops(data_dir: str, number: int, side: int, generator: torch.Generator) -> Tensor:
    """Return reduced crops of photographs of the Kodak set, shape (number, 3, side, side)."""
    files = find_photographs(Path(data_dir) / "kodak")
    if not files:
        raise expected("data_dir", "a directory with photographs in kodak/", repr(data_dir))
    crops = []
    for place in torch.randint(len(files), (number,), generator=generator).tolist():
        photograph = read_photograph(files[place]).float() / 255
        wide = REDUCED * side
        top, left = (int(torch.randint(size - wide + 1, (), generator=generator)) for size in photograph.shape[1:])
        crops.append(photograph[:, top : top + wide, left : left + wide])
    return F.interpolate(torch.stack(crops), size=(side, side), mode="area")


@torch.no_grad()
def activations(network: nn.Module, images: Tensor) -> Array:
    """Return what goes into the last linear layer, shape (N, number of units)."""
    found: list[Tensor] = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for batch in images.split(256):
        network(batch)
    hook.remove()
    return torch.cat(found).numpy()


def ask_cleanlab(features: Array, issue: str) -> Any:
    """Return the table in which Datalab says, at its default thresholds, which samples have an issue."""
    lab = Datalab({"sample": np.arange(len(features))}, verbosity=0)
    lab.find_issues(features=features, issue_types={issue: {}})
    return lab.get_issues(issue)


def cleanlab_sets(features: Array) -> Array:
    """Return the number of the set of near-duplicates, by Datalab, that each of N samples is in; -1 for none."""
    table = ask_cleanlab(features, "near_duplicate")
    pairs = [(one, other) for one, others in enumerate(table["near_duplicate_sets"]) for other in others]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    _, names = connected_components(csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(table),) * 2), directed=False)
    return np.where(table["is_near_duplicate_issue"], names, -1)


def judge_sets(names: Array, planted: Planted) -> dict[str, float]:
    """Compare the sets of near-duplicates that were found with those that were planted.

    Args:
        names: shape (N,), the number of the set that each image was found in, -1 for none.
        planted: what there is to be found.

    Returns:
        for each kind "KIND recall", the share of copies and originals in one set with their twin; "KIND precision", those
        against them and all that were flagged in error; the same of "all"; "sets", the share of sets of four that were
        found as they are; "errors", the number flagged in error.
    """
    found = np.zeros(len(names), dtype=bool)
    wrong = names >= 0
    whole: list[bool] = []
    for original in np.unique(planted.origin[planted.kind != ""]):
        members = planted.origin == original
        values, counts = np.unique(names[members], return_counts=True)
        together = members & np.isin(names, values[(values >= 0) & (counts > 1)])
        found |= together
        wrong &= ~together
        if planted.kind[original] == "set":
            whole.append(names[original] >= 0 and np.array_equal(names == names[original], members))
    figures = {"errors": float(wrong.sum()), "sets": float(np.mean(whole)) if whole else np.nan}
    for kind in (*KINDS, "set", "all"):
        rows = planted.kind != "" if kind == "all" else planted.kind == kind
        figures |= rates(found[rows], int(wrong.sum()), kind)
    return figures


def rates(found: Array, errors: int, kind: str) -> dict[str, float]:
    """Return recall and precision, where `found` says of each of those planted whether it was found."""
    hits = int(found.sum())
    precision = hits / (hits + errors) if hits + errors else float("nan")
    return {f"{kind} recall": float(found.mean()) if len(found) else float("nan"), f"{kind} precision": precision}


def judge_leaks(flagged: Array, kinds: Sequence[str]) -> dict[str, float]:
    """Compare the leaks that were found with those that were planted: N flags, and N kinds, "" where none was planted."""
    kind, found = np.array(kinds, dtype=object), flagged.astype(bool)
    errors = int((found & (kind == "")).sum())
    figures = {"errors": float(errors)}
    for name in (*KINDS, "all"):
        figures |= rates(found[kind != "" if name == "all" else kind == name], errors, name)
    return figures
