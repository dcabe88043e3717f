"""Compare the patches of two images, wherever in a window they are: patch MMD, and MMD++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_netsim._checks import check_positive_number
from lightning_netsim.functional.patch_mmd import check_windows, random_patch_mmd, remove_patch_means
from lightning_netsim.functional.random_features import check_num_features, draw_frequencies
from lightning_netsim.losses.image import AbstractImageLoss, reduce_windows


class PatchMMDLoss(AbstractImageLoss):
    """Compute the squared MMD between the patches of two images, averaged over windows: a perceptual loss without a network.

    In each window, the patches of one image are to be distributed as those of the other, wherever they lie in it. With p, p'
    and q, q' the patches of both images there and k(p, q) = exp(−‖p − q‖²/(2σ²)), it is

        mean k(p, p') + mean k(q, q') − 2 mean k(p, q)  +  w · mean over positions (1 − exp(−‖p − q‖²/(2 · 0.9²))),

    the second term with `local_weight` only, between patches at the same place. ``PatchMMDLoss(remove_mean=True,
    local_weight=0.025)`` is MMD++ with the weight that the paper gives: sharp textures that keep to their place. (If the
    paper's first term is its average of squared differences of features, half of the squared MMD, that is 0.05 here.) The first
    term is estimated by random Fourier features, see `random_patch_mmd`, which also says which windows there are.

    Args:
        bandwidth: σ of the patches, for pixels in [−1, 1], to which images are scaled from `value_range`. The paper takes
            0.54 to 0.72.
        num_features: r, the random features, even: cosines and sines of r/2 frequencies.
        patch_size: P, the height and width of a patch; it has P·P·C numbers.
        window: patches in a window, in height and width; no larger than the images allow.
        stride: patches between windows, at most `window`.
        remove_mean: leave out the mean of each patch in each channel, so that the first term ignores brightness and color.
        local_weight: of the second term, at least 0.
        local_bandwidth: σ of the second term.
        value_range: the least and the greatest value of pixels. Targets outside are refused; what a network puts out may
            overshoot.
        redraw: draw new features at each call in training mode, so that over the steps of a training the exact kernel is
            minimized; in evaluation mode, or with False, the first draw is used always.
        reduction: "mean" over the images, or "none".
        seed: of the draws, which begin anew where a run is resumed.

    Raises:
        NetsimError: for a value out of range; later, for images that do not fit.

    Source: Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021. The paper's average of squared
    differences of features estimates half of the squared MMD.

    Example:
        >>> loss = PatchMMDLoss(local_weight=0.025, remove_mean=True)
        >>> image = torch.rand(1, 3, 64, 64)
        >>> loss(image, image).item()
        0.0
        >>> bool(loss(image.roll(1, 3), image) < loss(torch.zeros_like(image), image))
        True
    """

    def __init__(
        self,
        bandwidth: float = 0.6,
        num_features: int = 512,
        patch_size: int = 3,
        window: int = 32,
        stride: int = 16,
        remove_mean: bool = False,
        local_weight: float = 0.0,
        local_bandwidth: float = 0.9,
        value_range: Sequence[float] = (0.0, 1.0),
        redraw: bool = True,
        reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(value_range, redraw, reduction, seed)
        self.bandwidth = check_positive_number("bandwidth", bandwidth)
        self.num_features = check_num_features(num_features)
        self.patch_size = patch_size
        check_windows(None, patch_size, window, stride, remove_mean)
        self.window, self.stride = window, stride
        self.remove_mean = remove_mean
        self.local_weight = 0.0 if local_weight == 0 else check_positive_number("local_weight", local_weight)
        self.local_bandwidth = check_positive_number("local_bandwidth", local_bandwidth)

    def compute(self, input: Tensor, target: Tensor) -> Tensor:
        size, channels = self.patch_size, input.shape[1]
        drawn = draw_frequencies(self.num_features, channels * size * size, self.bandwidth, self._drawing())
        frequencies = drawn.to(input).view(-1, channels, size, size)
        if self.remove_mean:
            frequencies = remove_patch_means(frequencies)
        loss = random_patch_mmd(input, target, frequencies, self.window, self.stride, self.reduction)
        if self.local_weight:  # Times the mean of 1 − exp(−‖p − q‖²/(2σ²)) over the patches at the same place.
            squares = (input - target).square().sum(1, keepdim=True)
            distances = size**2 * F.avg_pool2d(squares, size, stride=1)
            local = reduce_windows(-torch.expm1(distances * (-0.5 / self.local_bandwidth**2)), self.reduction)
            loss = loss + self.local_weight * local
        return loss
