"""Enlarge photographs four times: do patch MMD and random networks teach what a trained perceptual loss teaches?

After section 5 of Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021 (supplement 2.3), at a size
that one core can train: a small SRResNet on crops of 15 photographs of the Kodak set. For each seed one network learns by the
squared error of pixels (L2), and from there on a copy of it by each loss; all copies see the same crops. The weight of the L2
term that is added to every loss, and the bandwidth of MMD, are those with the least sliced Wasserstein distance (SWD) on three
more photographs, for networks of the first seed; six others are then judged by PSNR, SSIM and SWD.

    python experiments/images/super_resolution.py --data-dir DIRECTORY [--weights FILE] [--quick] [--out DIRECTORY]

Beside the tables it writes a picture and every run (`runs.csv`, `networks/`). Runs that stand in `runs.csv` already are not
repeated: an interrupted experiment goes on where it was; delete the directory to start again.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.transforms.v2.functional import center_crop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.images.vgg_weights import LAYERS, read_vgg_weights
from lab import Mean, Size, Study, mean_of, script
from lab.figures import pictures
from lightning_netsim._checks import expected
from lightning_netsim.demos import SuperResolutionNetwork, SuperResolver
from lightning_netsim.demos.photographs import (
    PhotographBatch,
    RandomCrops,
    WholePhotographs,
    find_photographs,
    read_photograph,
    upscale,
)
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.functional import laplacian_pyramid
from lightning_netsim.losses import PatchMMDLoss, VGGLoss
from lightning_netsim.report.pictures import Thumbnail, to_image

SIZES = {
    "blocks": Size(4, 1, "residual blocks of the network"),
    "width": Size(32, 8, "channels of the network"),
    "crop_size": Size(64, None, "sides of the crops"),
    "start_steps": Size(3000, 20, "steps of L2 before the losses part"),
    "steps": Size(150, 2, "steps of each loss"),
    "patches": Size(256, 16, "patches of each tile and level that are compared"),
    "seeds": Size((1000, 0), (0,), "of the networks; the first one chooses the settings"),
    "weights": Size("", None, "VGG-19 (normalized) up to conv3_1; by default DATA_DIR/weights/vgg19_normalised_conv3_1.pth"),
}
# Places of the photographs in the set: kodim04, 08, ... are judged in the end, kodim02, 10 and 18 choose the settings.
TEST, VALIDATION = (3, 7, 11, 15, 19, 23), (1, 9, 17)
BATCH_SIZE = 8
NUM_FEATURES = 512
# Sides of the tiles whose patches are compared; they divide the sides of every photograph.
TILE = 256
FIGURES = ("psnr", "ssim", "swd")
Grid = dict[str, tuple[tuple[float, float], ...]]
# For each loss, the weights of L2 that are tried, and with each the bandwidth.
GRID: Grid = {
    "L2": ((1.0, 0.0),),
    "VGG": ((100.0, 0.0), (300.0, 0.0), (1000.0, 0.0)),
    "random VGG": ((10.0, 0.0), (30.0, 0.0), (100.0, 0.0), (300.0, 0.0)),
    "MMD": ((3.0, 0.72), (10.0, 0.72), (30.0, 0.72), (10.0, 0.54)),
    "MMD++": ((3.0, 0.72), (10.0, 0.72), (30.0, 0.72)),
}
# Photographs and, in them, upper left corners of the details in the picture: row and column in pixels.
SHOWN = {"kodim08.png": (202, 282), "kodim20.png": (252, 352), "kodim24.png": (252, 252)}
DETAIL = 96


@dataclass(frozen=True)
class Setting:
    """By which loss a network learns, with which weight of L2, and with which bandwidth if it is MMD."""

    loss: str = "L2"
    pixel_weight: float = 1.0
    bandwidth: float = 0.0

    def __str__(self) -> str:
        weight = "" if self.loss == "L2" else f" + {self.pixel_weight:g} L2"
        return self.loss + (f" σ={self.bandwidth:g}" if self.bandwidth else "") + weight

    def criterion(self, weights: dict[str, Tensor] | str, seed: int) -> nn.Module | None:
        """Return what is added to the squared error of pixels."""
        mmd = partial(PatchMMDLoss, bandwidth=self.bandwidth, num_features=NUM_FEATURES, seed=seed)
        makers: dict[str, Callable[[], nn.Module | None]] = {
            "L2": lambda: None,
            "VGG": lambda: VGGLoss(weights, layers=LAYERS),
            "random VGG": lambda: VGGLoss(mode="redrawn", layers=LAYERS, seed=seed),
            "MMD": mmd,
            "MMD++": partial(mmd, remove_mean=True, local_weight=0.025),
        }
        return makers[self.loss]()


@dataclass(frozen=True)
class Photographs:
    """The Kodak set: those to learn from, those to choose by, those to be judged in the end."""

    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]
    test_names: list[str]

    @classmethod
    def load(cls, data_dir: str, side: int | None = None) -> Photographs:
        """Read the 24 photographs from DIRECTORY/kodak, or the middle of each, so many pixels high and wide."""
        files = find_photographs(Path(data_dir) / "kodak")
        if len(files) != 24:
            got = f"{data_dir!r} with {len(files)} of these files"
            raise expected("data_dir", "a directory with kodak/kodim01.png to kodak/kodim24.png in it", got)
        photographs = [read_photograph(file) for file in files]
        if side is not None:
            photographs = [center_crop(photograph, [side, side]) for photograph in photographs]
        train = [photograph for place, photograph in enumerate(photographs) if place not in TEST + VALIDATION]
        validation, test = ([photographs[place] for place in places] for places in (VALIDATION, TEST))
        return cls(train, validation, test, [files[place].name for place in TEST])


def train(model: SuperResolver, crops: RandomCrops, seed: int) -> SuperResolutionNetwork:
    """Train a model and return its network; the crops that it sees depend on the seed alone."""
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, limit_val_batches=0, **quiet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer.fit(model, DataLoader(crops, batch_size=BATCH_SIZE))
    return model.network.eval()


@torch.no_grad()
def enlarge(network: nn.Module, pair: PhotographBatch) -> Tensor:
    """Return what a network makes of a reduced photograph, shape (3, H, W), values in [0, 1]."""
    output: Tensor = network(pair[0].unsqueeze(0))
    return output.squeeze(0).clamp(0, 1)


class Bicubic(nn.Module):
    """Enlarge by interpolation alone: what every network is compared with."""

    def forward(self, low: Tensor) -> Tensor:
        return upscale(low)


def tiles(image: Tensor) -> Tensor:
    """Cut an image, shape (3, H, W), into tiles, shape (T, 3, 256, 256)."""
    return image.unfold(1, TILE, TILE).unfold(2, TILE, TILE).permute(1, 2, 0, 3, 4).flatten(0, 1)


def patch_distances(images: Sequence[Tensor], originals: Sequence[Tensor], patches: int) -> dict[str, float]:
    """Return the SWD of patches of images, each of shape (3, H, W), from those of the originals: the mean and each level."""
    distance = SlicedWassersteinDistance(patches_per_image=patches)
    for image, original in zip(images, originals, strict=True):
        distance.update(tiles(image), real=False)
        distance.update(tiles(original), real=True)
    return {name: float(value) for name, value in distance.compute().items()}


def detail(image: Tensor) -> Tensor:
    """Return the standard deviation of the finest level of an image's Laplacian pyramid."""
    finest: Tensor = laplacian_pyramid(image.unsqueeze(0), 2)[0]
    return finest.std()


def judge(network: nn.Module, photographs: Sequence[Tensor], patches: int) -> dict[str, float]:
    """Return how near a network comes to photographs.

    PSNR, SSIM and detail, which is relative to that of the original, are means over the photographs.
    """
    pairs = list(WholePhotographs(photographs))
    outputs = [(enlarge(network, pair), pair[1]) for pair in pairs]
    batches = [(output.unsqueeze(0), original.unsqueeze(0)) for output, original in outputs]
    each = {
        "psnr": [peak_signal_noise_ratio(*batch, data_range=1.0) for batch in batches],
        "ssim": [structural_similarity_index_measure(*batch, data_range=1.0) for batch in batches],
        "detail": [detail(output) / detail(original) for output, original in outputs],
    }
    means = {name: float(torch.stack(values).mean()) for name, values in each.items()}
    return means | patch_distances(*zip(*outputs, strict=True), patches)


class Runs:
    """Trained and judged networks, by setting and seed: their figures are kept in a log, their weights beside it."""

    def __init__(self, study: Study, photographs: Photographs, weights: dict[str, Tensor]) -> None:
        self.log, self.options, self.photographs, self.weights = study.log, study.options, photographs, weights
        self.networks = study.options.out / "networks" / f"{self.options.blocks}x{self.options.width}, {self.options.crop_size}"
        self.size = {name: study.sizes[name] for name in ("blocks", "width", "crop_size", "start_steps", "patches")}

    def of(self, setting: Setting, part: str, seeds: Sequence[int]) -> list[dict[str, float]]:
        """Return what the networks of all seeds are worth on the photographs of "validation" or "test"."""
        key = {"part": part, "setting": str(setting), "steps": self.options.steps, **self.size}
        return self.log.by_seed(key, seeds, partial(self._run, setting, part))

    def bicubic(self, part: str) -> list[dict[str, float]]:
        """Return what interpolation is worth."""
        key = {"part": part, "setting": "bicubic", "steps": 0, **self.size, "seed": ""}
        return [self.log.get(key, lambda: self._judge(Bicubic(), part) | {"seconds": 0.0})]

    def floor(self) -> float:
        """Return the SWD of patches of the originals from other patches of the same, drawn at random."""
        originals = [pair[1] for pair in WholePhotographs(self.photographs.test)]
        return patch_distances(originals, originals, self.options.patches)["swd"]

    def network(self, setting: Setting, seed: int) -> SuperResolutionNetwork:
        """Return the trained network, from its file if there is one."""
        name = f"{setting}, {self.options.steps} steps after {self.options.start_steps}, seed {seed}"
        return self._kept(name, seed, partial(self._tune, setting, seed))

    def _run(self, setting: Setting, part: str, seed: int) -> dict[str, float]:
        self._start(seed)  # its time is not that of the loss
        begin = time.perf_counter()
        network = self.network(setting, seed)
        seconds = time.perf_counter() - begin
        return self._judge(network, part) | {"seconds": seconds}

    def _judge(self, network: nn.Module, part: str) -> dict[str, float]:
        return judge(network, getattr(self.photographs, part), self.options.patches)

    def _tune(self, setting: Setting, seed: int) -> SuperResolutionNetwork:
        model = self._new(seed, setting.criterion(self.weights, seed), setting.pixel_weight)
        model.network.load_state_dict(self._start(seed).state_dict())
        return train(model, self._crops(self.options.steps), seed + 500)  # crops other than those of the beginning

    def _start(self, seed: int) -> SuperResolutionNetwork:
        steps = self.options.start_steps
        return self._kept(f"start, {steps} steps, seed {seed}", seed, lambda: train(self._new(seed), self._crops(steps), seed))

    def _new(self, seed: int, criterion: nn.Module | None = None, pixel_weight: float = 1.0) -> SuperResolver:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SuperResolver(self.options.blocks, self.options.width, criterion=criterion, pixel_weight=pixel_weight)

    def _crops(self, steps: int) -> RandomCrops:
        return RandomCrops(self.photographs.train, self.options.crop_size, steps * BATCH_SIZE)

    def _kept(self, name: str, seed: int, make: Callable[[], SuperResolutionNetwork]) -> SuperResolutionNetwork:
        path = self.networks / f"{name}.pt"
        if path.is_file():
            network = self._new(seed).network.eval()
            network.load_state_dict(torch.load(path, weights_only=True))
            return network
        network = make()
        self.networks.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
        return network


def choose(runs: Runs, grid: Grid, seeds: Sequence[int]) -> tuple[dict[str, Setting], dict[str, list[dict[str, float]]]]:
    """Choose weight of L2 and bandwidth of each loss by the SWD on the validation photographs."""
    tried: dict[str, list[dict[str, float]]] = {"bicubic": runs.bicubic("validation")}
    chosen = {}
    for loss, pairs in grid.items():
        settings = [Setting(loss, weight, bandwidth) for weight, bandwidth in pairs]
        found = {setting: runs.of(setting, "validation", seeds) for setting in settings}
        tried |= {str(setting): rows for setting, rows in found.items()}
        chosen[loss] = min(settings, key=lambda setting: sum(row["swd"] for row in found[setting]))
    return chosen, tried


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Mean]:
    """Return mean and standard error of each figure."""
    return {name: round(mean_of(rows, name), 5) for name in rows[0]}


def write_table(study: Study, part: str, found: dict[str, dict[str, Mean]], bold: Sequence[str] = ()) -> None:
    """Write the figures, on test photographs with their errors and the levels of the SWD; the names in `bold` were chosen."""
    levels = [name for name in next(iter(found.values())) if name.startswith("swd_")] if part == "test" else []
    rows: list[list[object]] = []
    for name, row in found.items():
        main = [row[key] if row[key].error and part == "test" else row[key].mean for key in FIGURES]
        rows.append([f"**{name}**" if name in bold else name, *main, *(row[key].mean for key in ("detail", *levels))])
    head = ("loss", "PSNR, dB", "SSIM", "SWD", "detail", *(f"SWD {name[4:]}" for name in levels))
    study.table(part, head, rows, ("", ".2f", ".4f", ".4f", ".2f", *[".4f"] * len(levels)), part)


def details(networks: dict[str, nn.Module], photographs: Photographs) -> dict[str, dict[str, Thumbnail]]:
    """Return details of photographs that were not learned from, as every network enlarges them, and as they are."""
    found = {}
    for name, (y, x) in SHOWN.items():
        pair = WholePhotographs(photographs.test)[photographs.test_names.index(name)]
        images = {"reduced": pair[0].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)}
        images |= {loss: enlarge(network, pair) for loss, network in networks.items()}
        images["original"] = pair[1]
        small = TILE in pair[1].shape  # A quick run takes the middle of each photograph.
        found[name.removesuffix(".png")] = {
            loss: to_image(center_crop(image, [DETAIL, DETAIL]) if small else image[:, y : y + DETAIL, x : x + DETAIL])
            for loss, image in images.items()
        }
    return found


@script(SIZES)
def main(study: Study) -> dict[str, Any]:
    options = study.options
    photographs = Photographs.load(options.data_dir, TILE if options.quick else None)
    runs = Runs(study, photographs, read_vgg_weights(options.weights, options.data_dir))
    grid = {loss: pairs[:1] for loss, pairs in GRID.items()} if options.quick else GRID
    chosen, tried = choose(runs, grid, options.seeds[:1])
    best = [str(setting) for loss, setting in chosen.items() if len(grid[loss]) > 1]
    write_table(study, "validation", {name: summarize(rows) for name, rows in tried.items()}, best)
    rows = {"bicubic": runs.bicubic("test")}
    rows |= {loss: runs.of(setting, "test", options.seeds) for loss, setting in chosen.items()}
    found = {loss: summarize(some) for loss, some in rows.items()}
    write_table(study, "test", found)
    print(f"\nSWD of the originals from themselves, by other patches: {(floor := runs.floor()):.4f}")
    networks = {loss: runs.network(setting, options.seeds[0]) for loss, setting in chosen.items()}
    shown = details({"bicubic": Bicubic()} | networks, photographs)
    reading = (
        f"Details of {DETAIL}×{DETAIL} pixels of held-out photographs, enlarged four times by networks trained by these losses."
    )
    study.figure(pictures("Super-resolution ×4", reading, shown))
    return {name: {loss: row[name].mean for loss, row in found.items()} for name in FIGURES} | {
        "swd_floor": round(floor, 5),
        "setting": {loss: str(setting) for loss, setting in chosen.items()},
        "test": found,
        "options": study.sizes,
    }


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # Many short trainings, with nothing to say.
    main()
