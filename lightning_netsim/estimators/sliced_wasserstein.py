"""Compare two sets of images by the distribution of their patches, scale by scale."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_netsim._checks import check_finite, check_positive_int, check_seed, check_tensor, expected
from lightning_netsim.functional.wasserstein import laplacian_pyramid, sliced_wasserstein

# Levels go down to images of this size, where a patch sees half of them.
_SMALLEST = 16


class SlicedWassersteinDistance(Metric):
    """Compute the sliced Wasserstein distance between the patches of two sets of images, on each level of a Laplacian pyramid.

    Of each image and level, patches are taken at random places; at each level, those of a set are standardized by the mean and
    the deviation of each channel in that set (a channel that does not vary becomes 0); the distance is the mean over random
    directions of length 1 of the Wasserstein-1 distance along them: 0.1 is a tenth of the standard deviation of a pixel. What
    all images of a set share, brightness and contrast, is not seen. Two equal sets are not at 0, as patches are drawn for each:
    of eight images, at 0.06.

    A torchmetrics metric: `update` it with batches of both sets, ``real=True`` for one of them, in ``validation_step``; in
    ``on_validation_epoch_end`` log what `compute` returns, ``self.log_dict(self.metric.compute())``, and `reset` it. Where the
    sets have different numbers of patches, as many are drawn from the larger as the smaller has, without replacement,
    `num_draws` times, and the distances averaged. Of several processes, each needs images of both sets.

    Args:
        num_levels: of the pyramid; None for as many as leave 16 pixels on the shorter side, at least 1.
        patch_size: P, the height and width of a patch; at most the shorter side of the smallest level.
        patches_per_image: patches of each image and level.
        num_directions: directions.
        num_draws: draws from the larger set.
        seed: of places, directions and draws.

    Raises:
        NetsimError: for a value out of range; later, for images that are too small or of another size than those before.

    Source: Karras et al., Progressive Growing of GANs, ICLR 2018, section 5; Amir and Weiss, CVPR 2021,
    supplement 2.2.

    Example:
        >>> metric = SlicedWassersteinDistance()
        >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> metric.update(images, real=True)
        >>> metric.update(images.cumsum(3), real=False)
        >>> sorted(metric.compute())
        ['swd', 'swd_16', 'swd_32']
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(
        self,
        num_levels: int | None = None,
        patch_size: int = 7,
        patches_per_image: int = 128,
        num_directions: int = 512,
        num_draws: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_levels = None if num_levels is None else check_positive_int("num_levels", num_levels)
        self.patch_size = check_positive_int("patch_size", patch_size)
        self.patches_per_image = check_positive_int("patches_per_image", patches_per_image)
        self.num_directions = check_positive_int("num_directions", num_directions)
        self.num_draws = check_positive_int("num_draws", num_draws)
        self.seed = check_seed("seed", seed)
        self.real: list[Tensor]
        self.generated: list[Tensor]
        for name in ("real", "generated"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.size: Tensor
        self.add_state("size", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="max")  # C, H, W; 0 before the first.
        self._generator = torch.Generator().manual_seed(self.seed)

    def update(self, images: Tensor, real: bool) -> None:
        """Add images to one of the sets.

        Args:
            images: shape (B, C, H, W), in any range: both sets in the same.
            real: whether they belong to the reference set.
        """
        images = check_finite("images", check_tensor("images", images, 4, like="(B, C, H, W)")).detach()
        if not len(images):
            return
        size, before = images.shape[1:], tuple(self.size.tolist())
        if any(before) and size != before:
            wanted = f"of shape (B, {', '.join(map(str, before))}), as those before"
            raise expected("images", wanted, f"shape {tuple(images.shape)}", "Crop or resize all images to one size.")
        num_levels = self.num_levels or 1 + int(math.log2(max(1, min(size[1:]) / _SMALLEST)))
        levels = laplacian_pyramid(images, num_levels)
        if min(levels[-1].shape[2:]) < self.patch_size:
            got = f"shape {tuple(images.shape)} with {len(levels)} levels"
            raise expected("images", f"large enough for patches of {self.patch_size} pixels", got, "Choose fewer levels.")
        self.size = torch.tensor(size, device=self.size.device)
        patches = torch.stack([self._patches(level) for level in levels], dim=1)
        (self.real if real else self.generated).append(patches)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a distance of two sets is not that of one batch.

        Raises:
            NetsimError: always.
        """
        remedy = "Call `update(images, real=...)` for batches of both sets, then `compute()`."
        raise expected("SlicedWassersteinDistance", "updated and computed", "a call as a function", remedy)

    def compute(self) -> dict[str, Tensor]:
        """Return the distance at each level by the height of its images, ``swd_64`` and so on, and their mean, ``swd``.

        Raises:
            NetsimError: if a set has no images.
        """
        for name, some in (("real", self.real), ("generated", self.generated)):
            if not len(some):
                wanted = f"called with images of both sets, also with `real={name == 'real'}`"
                raise expected("update", wanted, "no such call", "Call it before `compute`.")
        sets = [dim_zero_cat(some) for some in (self.real, self.generated)]
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(self.num_directions, sets[0].shape[2], generator=generator)
        directions = normal / normal.norm(dim=1, keepdim=True)
        sets = [self._standardized(some) for some in sets]
        size = min(len(some) for some in sets)
        figures = torch.zeros(sets[0].shape[1])
        draws = self.num_draws if len(sets[0]) != len(sets[1]) else 1
        for _ in range(draws):
            pair = [some if len(some) == size else some[torch.randperm(len(some), generator=generator)[:size]] for some in sets]
            levels = zip(*(some.unbind(1) for some in pair), strict=True)
            figures += torch.stack([sliced_wasserstein(x, y, directions).cpu() for x, y in levels]) / draws
        height = int(self.size[1])
        named = {f"swd_{math.ceil(height / 2**level)}": figure for level, figure in enumerate(figures)}
        return {"swd": figures.mean(), **named}

    def reset(self) -> None:
        """Forget all images, and draw as at the beginning."""
        super().reset()
        self._generator.manual_seed(self.seed)

    def _patches(self, images: Tensor) -> Tensor:
        """Return patches at random places, shape (B · patches, C·P²)."""
        size, number = self.patch_size, self.patches_per_image
        patches = images.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, rows, columns, P, P)
        places = [
            torch.randint(patches.shape[dim], (len(images), number), generator=self._generator).to(images.device)
            for dim in (2, 3)
        ]
        owners = torch.arange(len(images), device=images.device).unsqueeze(1)
        return patches[owners, :, places[0], places[1]].flatten(2).flatten(0, 1)  # From (B, patches, C, P, P).

    def _standardized(self, patches: Tensor) -> Tensor:
        """Return patches (n, levels, C·P²) minus the mean of each channel, over its deviation, of all at a level."""
        channels = patches.view(*patches.shape[:2], -1, self.patch_size**2)
        deviation, mean = torch.std_mean(channels, dim=(0, 3), keepdim=True, correction=0)
        # What rounding leaves of a channel that does not vary is no variation.
        flat = deviation <= 1e-6 * channels.abs().amax((0, 1, 3), keepdim=True)
        standardized: Tensor = ((channels - mean) / deviation.where(~flat, 1.0)).where(~flat, 0.0).flatten(2)
        return standardized
