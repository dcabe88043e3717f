"""Average images under one loss or another: which losses keep the patches of a mean like those of the images?

After Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021, supplement 2.2: one image is optimized to
have the least mean loss to a set of similar images. Under L2 that is their blurred mean; under a perceptual loss it should be
sharp. Two families of sets: crops of a Kodak photograph that are shifted by up to ±4 pixels, and crops under smooth random
warps and changes of color, in place of generated faces. Judged by the sliced Wasserstein distance of patches in a Laplacian
pyramid, one image of each set against one target of each.

    python experiments/images/generalized_image_mean.py --data-dir DIRECTORY [--weights FILE] [--quick] [--out DIRECTORY]

Pixel weights and σ are chosen on photographs that are not judged. Beside the tables it writes picture grids, all images and
every run (`runs.csv`). Runs that stand there already are not repeated; delete the directory to start again.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.images.vgg_weights import LAYERS, read_vgg_weights
from lab import Mean, Size, Study, difference, mean_of, script
from lab.data import read_photographs
from lab.figures import pictures
from lab.training import take_step
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.functional import laplacian_pyramid
from lightning_netsim.losses import PatchMMDLoss, RandomNetworkLoss, VGGLoss
from lightning_netsim.report.pictures import to_image

# Pixels of the targets, which have half the resolution of the photographs.
SHIFT = 4
DISPLACEMENT, NODES, MARGIN = 3.0, 5, 12
# Changes of all colors together, and of each color.
GAIN, COLOR = 0.1, 0.03
BATCH, LEARNING_RATE = 5, 0.01
# tanh reaches black and white at infinity only.
WITHIN = 0.99
NUM_FEATURES, WIDTH, DEPTH = 256, 64, 3
# One of the images themselves, and their mean.
REFERENCES = ("target", "L2")
VGG_ARMS = {
    "VGG T": ("trained", False),
    "VGG TN": ("trained", True),
    "VGG R": ("random", False),
    "VGG RN": ("random", True),
    "VGG RS": ("redrawn", False),
    "VGG RSN": ("redrawn", True),
    "VGG FSN": ("first_trained", True),
}


def crop_center(photograph: Tensor, side: int) -> Tensor:
    """Return the square in the middle of a photograph, (3, side, side)."""
    top, left = ((size - side) // 2 for size in photograph.shape[1:])
    return photograph[:, top : top + side, left : left + side]


def draw_shifts(photograph: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return crops of the photograph at half its resolution, up to ±4 pixels off the center, (count, 3, size, size)."""
    around = F.avg_pool2d(crop_center(photograph, 2 * (size + 2 * SHIFT)), 2)
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    return torch.stack([around[:, top : top + size, left : left + size] for top, left in corners])


def draw_plain_warps(photograph: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return the crop in the center under smooth random displacements, (count, 3, size, size).

    Displacements are normal at 5×5 nodes, standard deviation 3 pixels, and bicubic between. The photograph is warped at its
    full resolution and halved afterwards, so that no sharpness is lost.
    """
    side, around = 2 * size, crop_center(photograph, 2 * (size + 2 * MARGIN))
    nodes = torch.randn(count, 2, NODES, NODES, generator=generator)
    moves = F.interpolate(nodes, size=(side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    # grid_sample counts from −1 to 1, the borders of `around`.
    places = (torch.arange(side) + 0.5 - size) / (size + 2 * MARGIN)
    rest = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)
    grid = rest + 2 * DISPLACEMENT / (size + 2 * MARGIN) * moves
    warped = F.grid_sample(around.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(warped, 2)


def draw_warps(photograph: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return such warps with colors multiplied by exp(0.1 ε + 0.03 ε_c), one ε for the image and one ε_c for each color."""
    warped = draw_plain_warps(photograph, size, count, generator)
    light, color = (torch.randn(count, channels, 1, 1, generator=generator) for channels in (1, 3))
    return (warped * torch.exp(GAIN * light + COLOR * color)).clamp(0, 1)


FAMILIES: dict[str, Callable[[Tensor, int, int, torch.Generator], Tensor]] = {
    "shifts": draw_shifts,
    "warps": draw_warps,
    "plain-warps": draw_plain_warps,
}


@dataclass(frozen=True)
class Arm:
    """What an image is optimized for: a loss, σ where it is an MMD, and the weight of the pixels."""

    loss: str
    weight: float = 0.1
    bandwidth: float = 0.63

    def __str__(self) -> str:
        if self.loss in REFERENCES:
            return self.loss
        sigma = f", σ = {self.bandwidth:g}" if self.loss.startswith("MMD") else ""
        return f"{self.loss}, pixels {self.weight:g}{sigma}"

    def build(self, vgg: dict[str, Tensor], seed: int) -> nn.Module:
        """Return the loss; what it draws depends on the seed alone."""
        if self.loss.startswith("MMD"):
            extended = self.loss == "MMD++"
            return PatchMMDLoss(
                bandwidth=self.bandwidth,
                num_features=NUM_FEATURES,
                remove_mean=extended,
                local_weight=0.025 if extended else 0.0,
                seed=seed,
            )
        if self.loss == "S-CNN":
            return RandomNetworkLoss(depth=DEPTH, width=WIDTH, seed=seed)
        mode, normalize = VGG_ARMS[self.loss]
        weights = vgg if mode in ("trained", "first_trained") else None
        return VGGLoss(weights, mode, layers=LAYERS, normalize=normalize, seed=seed)


def mean_under(loss: nn.Module, targets: Tensor, weight: float, steps: int, seed: int) -> tuple[Tensor, dict[str, float]]:
    """Return the generalized mean of images: the image of least mean loss to them.

    Minimizes mean_i [ loss(y, x_i) / L + weight ‖y − x_i‖² / V ] over y = (1 + tanh z) / 2, from the mean of all x_i on, in
    batches of 5, by Adam. L and V are the mean loss and the mean squared distance of the mean to the x_i: so one weight means
    the same for every loss, whatever its scale.

    Args:
        loss: of an image, shape (1, 3, H, W), and a batch.
        targets: the x_i, shape (N, 3, H, W), values in [0, 1].
        weight: of the pixels.
        steps: of Adam.
        seed: of the batches.

    Returns:
        y, shape (3, H, W), and what is left of both terms in the end, as a share of L and V.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = targets.mean(dim=0, keepdim=True)
    free = torch.atanh((2 * mean - 1).clamp(-WITHIN, WITHIN)).requires_grad_()
    optimizer = torch.optim.Adam([free], LEARNING_RATE)
    scale, spread = mean_loss(loss, mean, targets), float((mean - targets).square().mean())
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(len(targets), generator=generator).split(BATCH))
        batch = targets[batches.pop()]
        image = (1 + free.tanh()) / 2
        objective = loss(image, batch) / scale + weight * (image - batch).square().mean() / spread
        take_step(optimizer, objective)
    found = ((1 + free.detach().tanh()) / 2).clone()
    left = {"loss": mean_loss(loss, found, targets) / scale, "pixels": float((found - targets).square().mean()) / spread}
    return found[0], left


@torch.no_grad()
def mean_loss(loss: nn.Module, image: Tensor, targets: Tensor) -> float:
    """Return the mean loss of an image, (1, 3, H, W), to all targets; new weights for each batch where the loss draws them."""
    parts = targets.split(BATCH)
    return sum(float(loss(image, part)) * len(part) for part in parts) / len(targets)


def sliced_distance(images: Tensor, targets: Tensor, draws: int, patches: int = 128, seed: int = 0) -> dict[str, float]:
    """Return the sliced Wasserstein distance of one image for each set to one target of each, averaged over draws of targets.

    Args:
        images: shape (S, 3, H, W).
        targets: shape (S, N, 3, H, W); no target is drawn twice.
        draws: how often, at most N.
        patches: of each image and level.
        seed: of targets, patches and directions.

    Returns:
        "swd", and "swd_H" for the level of the Laplacian pyramid with the height H.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(targets.shape[1], generator=generator) for _ in targets]
    total: dict[str, float] = {}
    for draw in range(draws):
        metric = SlicedWassersteinDistance(patches_per_image=patches, seed=seed + draw)
        metric.update(images, real=False)
        metric.update(torch.stack([some[order[draw]] for some, order in zip(targets, orders, strict=True)]), real=True)
        for name, value in metric.compute().items():
            total[name] = total.get(name, 0.0) + float(value) / draws
    return total


def sharpness(image: Tensor, targets: Tensor) -> float:
    """Return the deviation of the finest band of the Laplacian pyramid of an image, as a multiple of that of the targets."""
    finest = [laplacian_pyramid(some, 2)[0] for some in (image.unsqueeze(0), targets)]
    own, others = (float(band.square().mean()) for band in finest)
    return math.sqrt(own / others)


# The first photographs are judged, the last ones serve the choice of settings.
JUDGED = range(1, 21)
HELD_OUT = range(21, 25)
WEIGHTS = (0.003, 0.03, 0.3)
BANDWIDTHS = (0.54, 0.63, 0.72)
# Patches of each image and level where one set is judged by itself.
PATCHES = 512
# Sets of each family in a picture.
SHOWN = 4
MAIN = ("MMD", "MMD++", "S-CNN", "VGG TN", "VGG RSN")
GRID = tuple(VGG_ARMS)
SIZES = {
    "families": Size(("shifts", "warps"), None, "which are judged", choices=tuple(FAMILIES)),
    "losses": Size(MAIN, None, "which of the main losses are judged", choices=MAIN),
    "size": Size(64, 36, "pixels of an image, in height and width"),
    "targets": Size(50, 10, "images in a set"),
    "steps": Size(150, 3, "of the optimization"),
    "draws": Size(5, 1, "of a target of each set to be judged by, fewer than there are"),
    "sets": Size(10, 2, "of each family, at most 20"),
    "grid_sets": Size(5, 1, "of each family for the grid of VGG networks, 0 for none"),
    "search_sets": Size(1, 1, "of each family for the choice of settings, at most 4"),
    "weights": Size("", None, "VGG-19 (normalized) up to conv3_1; by default DATA_DIR/weights/vgg19_normalised_conv3_1.pth"),
}
PAIRS = (
    ("MMD", "L2"),
    ("MMD++", "L2"),
    ("S-CNN", "L2"),
    ("VGG TN", "L2"),
    ("VGG RSN", "L2"),
    ("MMD++", "MMD"),
    ("S-CNN", "MMD"),
    ("VGG RSN", "VGG TN"),
)
GRID_PAIRS = tuple((name, "VGG TN") for name in GRID if name != "VGG TN")


class Runs:
    """Generalized means, by family, photograph and arm, kept in a log and a directory of images."""

    def __init__(self, study: Study) -> None:
        options = study.options
        self.log, self.photographs = study.log, read_photographs(options.data_dir)
        self.vgg = read_vgg_weights(options.weights, options.data_dir)
        self.sizes = {name: getattr(options, name) for name in ("size", "targets", "steps", "draws")}
        self.images = options.out / "images" / "-".join(f"{name}-{value}" for name, value in self.sizes.items())
        self.targets = cache(self._draw)

    def _draw(self, family: str, photograph: int) -> Tensor:
        """Return the images that are averaged, shape (N, 3, H, W)."""
        generator = torch.Generator().manual_seed(100 * list(FAMILIES).index(family) + photograph)
        return FAMILIES[family](self.photographs[photograph - 1], self.sizes["size"], self.sizes["targets"], generator)

    def of(self, arm: Arm, family: str, photograph: int) -> dict[str, float]:
        """Return what the mean of a set is worth: its distance to the targets, its sharpness, what is left of the loss."""
        key = {"family": family, "photograph": photograph, "arm": str(arm), **self.sizes}
        return self.log.get(key, partial(self._run, arm, family, photograph))

    def image(self, arm: Arm, family: str, photograph: int) -> Tensor:
        """Return the mean itself, shape (3, H, W)."""
        self.of(arm, family, photograph)
        image: Tensor = torch.load(self._path(arm, family, photograph), weights_only=True)
        return image

    def _path(self, arm: Arm, family: str, photograph: int) -> Path:
        return self.images / (re.sub(r"[^\w.+]+", "_", f"{family} {photograph} {arm}") + ".pt")

    def _run(self, arm: Arm, family: str, photograph: int) -> dict[str, float]:
        start = time.perf_counter()
        targets = self.targets(family, photograph)
        left = {"loss": 1.0, "pixels": 1.0}
        if arm.loss == "target":
            image = targets[0]
        elif arm.loss == "L2":
            image = targets.mean(dim=0)
        else:
            image, left = mean_under(arm.build(self.vgg, photograph), targets, arm.weight, self.sizes["steps"], photograph)
        seconds = time.perf_counter() - start
        path = self._path(arm, family, photograph)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(image.clone(), path)
        # The first target is a reference itself, so all are judged by the others.
        judged = sliced_distance(image[None], targets[None, 1:], self.sizes["draws"], PATCHES)
        return judged | {"sharpness": sharpness(image, targets)} | left | {"seconds": seconds}


def choose(runs: Runs, loss: str, photographs: Sequence[int], weights: Sequence[float]) -> tuple[Arm, dict[str, float]]:
    """Return the arm of a loss with the least mean distance: pixel weight, then σ if it has one; and what was tried."""

    def best(arms: dict[str, Arm]) -> Arm:
        tried.update({name: distance(runs, arm, photographs) for name, arm in arms.items()})
        return arms[min(arms, key=lambda name: tried[name])]

    tried: dict[str, float] = {}
    chosen = best({f"{weight:g}": Arm(loss, weight) for weight in weights})
    if loss.startswith("MMD"):
        chosen = best({f"σ = {sigma:g}": replace(chosen, bandwidth=sigma) for sigma in BANDWIDTHS})
    return chosen, tried


def distance(runs: Runs, arm: Arm, photographs: Sequence[int]) -> float:
    """Return the mean distance of an arm, set by set, over shifts and warps."""
    found = [[runs.of(arm, family, photograph)["swd"] for photograph in photographs] for family in ("shifts", "warps")]
    return sum(map(sum, found)) / (2 * len(photographs))


def judge(runs: Runs, arms: dict[str, Arm], family: str, photographs: Sequence[int]) -> dict[str, Any]:
    """Return for each loss the distance over all sets together, by level, and what each set says."""
    targets = torch.stack([runs.targets(family, photograph)[1:] for photograph in photographs])
    found = {}
    for name, arm in arms.items():
        each = [runs.of(arm, family, photograph) for photograph in photographs]
        images = torch.stack([runs.image(arm, family, photograph) for photograph in photographs])
        levels = sliced_distance(images, targets, runs.sizes["draws"])
        found[name] = {"together": levels, "each": each}
    return found


def compare(found: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """Return for pairs of losses the difference of their distances, set by set: mean, standard error, sets below 0."""
    gains = {}
    for name, other in pairs:
        if name not in found or other not in found:
            continue
        some, others = (found[one]["each"] for one in (name, other))
        mean = round(difference(some, others, "swd"), 5)
        gains[f"{name} − {other}"] = [*mean, sum(a["swd"] < b["swd"] for a, b in zip(some, others, strict=True))]
    return gains


def write_tables(study: Study, name: str, found: dict[str, Any], gains: dict[str, list[float]]) -> None:
    levels = list(next(iter(found.values()))["together"])
    sets = len(next(iter(found.values()))["each"])
    rows: list[list[object]] = []
    for loss, row in found.items():
        ends = [mean_of(row["each"], key).mean if loss != "target" else "" for key in ("loss", "pixels")]
        sharp = mean_of(row["each"], "sharpness").mean
        rows.append([loss, *(row["together"][level] for level in levels), mean_of(row["each"], "swd"), sharp, *ends])
    names = ["together", *(level.replace("swd_", "level ") for level in levels if level != "swd")]
    head = ["loss", *names, "set by set", "sharpness", "left", "pixels"]
    formats = ["", *[".4f"] * (len(levels) + 1), ".2f", ".3f", ".2f"]
    study.table(name, head, rows, formats, f"{name}, {sets} sets")
    rows = [[pair, Mean(mean, error), f"{below} of {sets}"] for pair, (mean, error, below) in gains.items()]
    head = ["difference, set by set", "mean ± standard error", "sets below 0"]
    study.table(f"{name}, differences", head, rows, ["", "+.4f"])


def report(
    study: Study, runs: Runs, arms: dict[str, Arm], photographs: Sequence[int], pairs: Sequence[tuple[str, str]], title: str
) -> dict[str, Any]:
    """Write tables and pictures of some arms, and return the figures by family."""
    families = study.options.families
    # So that an interrupted experiment has the first losses, or the first sets, complete.
    for arm in arms.values():
        for photograph in photographs:
            for family in families:
                runs.of(arm, family, photograph)
    figures: dict[str, Any] = {"swd": {}, "levels": {}, "sharpness": {}, "gains": {}}
    shown: dict[str, Any] = {}
    for family in families:
        found = judge(runs, arms, family, photographs)
        gains = compare(found, pairs)
        write_tables(study, f"{title}, {family}", found, gains)
        for name, row in found.items():
            levels = {level: round(value, 5) for level, value in row["together"].items()}
            sharp = round(mean_of(row["each"], "sharpness").mean, 3)
            for key, value in (("swd", levels["swd"]), ("levels", levels), ("sharpness", sharp)):
                figures[key].setdefault(family, {})[name] = value
        figures["gains"][family] = gains
        for photograph in photographs[:SHOWN]:
            images = {name: to_image(runs.image(arm, family, photograph)) for name, arm in arms.items()}
            shown[f"{family}\n{photograph}"] = images
    reading = (
        f"One row for each set of {runs.sizes['targets']} images: one of them, their mean, and their means under other losses."
    )
    name = "_".join([title.lower().replace(" ", "_"), *families])
    study.figure(pictures(f"Generalized means: {title}", reading, shown, side=1.0), name, dpi=150)
    return figures


def choose_all(study: Study, runs: Runs) -> dict[str, Arm]:
    """Return the references and the arm of each loss, its settings chosen on photographs that are not judged."""
    weights = WEIGHTS[1:2] if study.options.quick else WEIGHTS
    arms, rows = {name: Arm(name) for name in REFERENCES}, []
    columns = [*(f"{weight:g}" for weight in weights), *(f"σ = {sigma:g}" for sigma in BANDWIDTHS)]
    for loss in MAIN:
        arms[loss], tried = choose(runs, loss, HELD_OUT[: study.options.search_sets], weights)
        chosen = str(arms[loss]).removeprefix(f"{loss}, pixels ")
        rows.append([loss, *(tried.get(column, "") for column in columns), chosen])
    study.table("settings", ["", *columns, "chosen"], rows, ["", *[".4f"] * len(columns)])
    # The other VGG networks take the pixel weight of the one that they are compared with.
    for loss in GRID:
        arms.setdefault(loss, replace(arms["VGG TN" if loss == "VGG T" else "VGG RSN"], loss=loss))
    return arms


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    runs, options = Runs(study), study.options
    arms = choose_all(study, runs)
    main_arms, grid_arms = ({name: arms[name] for name in (*REFERENCES, *names)} for names in (options.losses, GRID))
    figures = report(study, runs, main_arms, JUDGED[: options.sets], PAIRS, "losses")
    if options.grid_sets:
        figures["grid"] = report(study, runs, grid_arms, JUDGED[: options.grid_sets], GRID_PAIRS, "VGG networks")
    return figures | {"setting": {name: str(arm) for name, arm in arms.items()}, "options": runs.sizes}


if __name__ == "__main__":
    main()
