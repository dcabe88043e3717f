"""What `generalized_image_mean.py` averages, and how: sets of images that differ a little, and their mean under a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from experiments.vgg_weights import LAYERS
from lightning_netsim._checks import expected
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.functional import laplacian_pyramid
from lightning_netsim.losses import PatchMMDLoss, RandomNetworkLoss, VGGLoss

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


def read_photographs(data_dir: str | Path) -> list[Tensor]:
    """Return the 24 photographs of the Kodak set in their order, each (3, H, W), colors in [0, 1]."""
    directory = Path(data_dir) / "kodak"
    paths = sorted(directory.glob("kodim*.png"))
    if len(paths) != 24:
        raise expected(
            "data_dir",
            "a directory with kodak/kodim01.png to kodak/kodim24.png in it",
            f"{str(data_dir)!r} with {len(paths)} of these files",
            "The Kodak Lossless True Color Image Suite has to be put there first.",
        )
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255 for path in paths]


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
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
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
