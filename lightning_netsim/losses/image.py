"""What the criteria of image pairs share: checks, scale, precision, and draws of random weights."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lightning_netsim._checks import check_choice, check_finite, expected
from lightning_netsim.functional._precision import full_precision
from lightning_netsim.functional.patch_mmd import check_pair
from lightning_netsim.losses.criterion import AbstractCriterion, Draws


class AbstractImageLoss(AbstractCriterion):
    """A distance of images, computed in float32 or better, also under autocast.

    Images are scaled from `value_range` to [−1, 1] first.

    Args:
        value_range: the least and the greatest value that pixels can have, for example (0, 1), (−1, 1) or (0, 255).
        redraw: what is random is drawn anew at each call in training mode; else the first draw is used always, as in
            evaluation mode.
        reduction: "mean" over the images, or "none" for one distance for each.
        seed: of the draws, which begin anew where a run is resumed.
    """

    def __init__(self, value_range: Sequence[float], redraw: bool, reduction: str, seed: int) -> None:
        super().__init__()
        low = high = math.nan
        with suppress(TypeError, ValueError):
            low, high = (float(value) for value in value_range)
        if isinstance(value_range, str) or not -math.inf < low < high < math.inf:
            raise expected("value_range", "two numbers, the least and the greatest value of a pixel", repr(value_range))
        self.value_range = (low, high)
        self.redraw = redraw
        self.reduction = check_choice("reduction", reduction, ("mean", "none"))
        self.seed = seed
        self._draws = Draws(seed)
        self._has_warned = False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the distance.

        Args:
            input: images, shape (B, C, H, W), for example what a network puts out: values may lie outside of `value_range`.
            target: as many images of this size, or either of them a single image, which is compared with each of the other.

        Returns:
            A scalar, or shape (B,) without reduction; at least 0, and 0 for equal images. Differentiable once.

        Raises:
            NetsimError: images are not finite floating-point tensors of one size, too small, or `target` has values outside
                `value_range`.
        """
        input, target = check_pair(input, target)
        check_finite("input", input)
        self._check_values(input, target)
        low, high = self.value_range
        input, target = ((images - low) * (2 / (high - low)) - 1 for images in (input, target.to(input)))
        with full_precision(input):
            return self.compute(input, target)

    @abstractmethod
    def compute(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the distance of images in [−1, 1], reduced."""

    def _drawing(self) -> torch.Generator:
        """Return what the weights of this call are drawn from."""
        return self._draws.generator(anew=self.redraw and self.training)

    def _check_values(self, input: Tensor, target: Tensor) -> None:
        low, high = self.value_range
        least, greatest = target.detach().aminmax()
        slack = 1e-3 * (high - low)  # Resampled images may overshoot by rounding.
        if not (low - slack <= float(least) and float(greatest) <= high + slack):
            got = f"values from {float(least):.4g} to {float(greatest):.4g}"
            remedy = "Set `value_range` to the least and greatest value of a pixel; undo a normalization by channels first."
            raise expected("target", f"images with values within `value_range` [{low:g}, {high:g}]", got, remedy)
        if max(-float(least), float(greatest)) <= 1 and high - low > 50:
            self._warn(f"`target` has values within [−1, 1], and `value_range` is [{low:g}, {high:g}]: set it to theirs.")
        least, greatest = input.detach().aminmax()
        if max(low - float(least), float(greatest) - high) > high - low:
            self._warn(
                f"`input` has values from {float(least):.4g} to {float(greatest):.4g}, far outside `value_range` "
                f"[{low:g}, {high:g}]: if these are images in another range, scale them to that of `target`."
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=4)


def reduce_windows(maps: Tensor, reduction: str) -> Tensor:
    """Return the mean of maps (B, ...) over all, or for each image."""
    each = maps.flatten(1).mean(1)
    return each.mean() if reduction == "mean" else each
