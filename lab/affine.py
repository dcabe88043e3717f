"""Random affine maps of small images: what two studies take for changes that leave the class as it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_maps(count: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Return random affine maps, shape (count, 2, 3): 30° of rotation, 15° of shear, 20 % of scale, 10 % of shift at most."""
    angle, shear, size, right, down = (2 * torch.rand(5, count, generator=generator) - 1) * scale
    angle, shear, size = angle * math.pi / 6, shear * math.pi / 12, 1 + 0.2 * size
    cos, sin, slant = angle.cos() * size, angle.sin() * size, shear.tan()
    rows = torch.stack([cos, slant * cos - sin, 0.2 * right, sin, slant * sin + cos, 0.2 * down], 1)
    return rows.view(count, 2, 3)


def transform(images: Tensor, maps: Tensor) -> Tensor:
    """Apply a map to each image, shape (B, C, H, W), bilinearly, with black around it."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
