"""Compare two images by a random convolutional network: what a wide one computes is a patch MMD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_netsim._checks import check_positive_int
from lightning_netsim.functional.patch_mmd import check_windows, pool_windows, remove_patch_means
from lightning_netsim.losses.image import AbstractImageLoss, reduce_windows

# Features below this length count as none.
_LEAST_LENGTH = 1e-4


class RandomNetworkLoss(AbstractImageLoss):
    """Compute the squared distance of two images in the features of a random network that sees patches: an S-CNN.

    The network has a P × P convolution and `depth` − 1 convolutions 1 × 1, each with ReLU, weights of He initialization and no
    biases; the features of each position are divided by their length. Features are then averaged over windows (`pooling`), so
    that the distance is, for ever wider networks, the MMD between the patches in each window under `arc_cosine_kernel`; or
    compared position by position, so that it is 2 − 2k(p, q) between patches at the same place.

    Args:
        depth: number of ReLU layers, at least 1.
        width: channels of each layer.
        patch_size: P, the height and width of a patch.
        pooling: average features over windows before they are compared.
        window: positions in a window, in height and width.
        stride: positions between windows, at most `window`.
        normalize: divide by the length; else patches of higher contrast, and brightness, weigh more.
        remove_mean: leave out the mean of each patch in each channel. Of a patch of one color nothing is left then: its
            features are 0.
        value_range: the least and the greatest value of pixels; they are scaled to [−1, 1].
        redraw: draw a new network at each call in training mode; in evaluation mode, or with False, the first is used always.
        reduction: "mean" over the images, or "none".
        seed: of the draws, which begin anew where a run is resumed.

    Raises:
        NetsimError: for a value out of range; later, for images that do not fit.

    Source: Amir and Weiss, CVPR 2021, theorem 1.1 of the supplement.

    Example:
        >>> image = torch.rand(1, 3, 64, 64)
        >>> loss = RandomNetworkLoss(width=32)
        >>> loss(image, image).item()
        0.0
        >>> bool(loss(image.roll(1, 3), image) < loss(1 - image, image))
        True
    """

    def __init__(
        self,
        depth: int = 3,
        width: int = 256,
        patch_size: int = 3,
        pooling: bool = True,
        window: int = 32,
        stride: int = 16,
        normalize: bool = True,
        remove_mean: bool = False,
        value_range: Sequence[float] = (0.0, 1.0),
        redraw: bool = True,
        reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(value_range, redraw, reduction, seed)
        self.depth = check_positive_int("depth", depth)
        self.width = check_positive_int("width", width)
        self.patch_size = patch_size
        self.pooling = pooling
        check_windows(None, patch_size, window, stride, remove_mean)
        self.window, self.stride = window, stride
        self.normalize = normalize
        self.remove_mean = remove_mean

    def compute(self, input: Tensor, target: Tensor) -> Tensor:
        size = (input.shape[2], input.shape[3])
        check_windows(size, self.patch_size, self.window if self.pooling else 1, self.stride if self.pooling else 1)
        layers = self.draw(input.shape[1])
        features = [self._features(images, [layer.to(images) for layer in layers]) for images in (input, target)]
        return reduce_windows((features[0] - features[1]).square().sum(1), self.reduction)

    def draw(self, channels: int) -> list[Tensor]:
        """Return the filters of each layer, for images of so many channels: normal numbers, of variance 2 over the inputs."""
        generator, layers = self._drawing(), []
        for layer in range(self.depth):
            shape = (self.width, channels, self.patch_size, self.patch_size) if layer == 0 else (self.width, self.width, 1, 1)
            filters = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
            layers.append(remove_patch_means(filters) if layer == 0 and self.remove_mean else filters)
        return layers

    def _features(self, images: Tensor, layers: list[Tensor]) -> Tensor:
        features = images
        for filters in layers:
            features = F.conv2d(features, filters).relu()
        if self.normalize:  # Without biases, at the end is as good as after each layer.
            features = unit_channels(features)
        else:  # Their squares add up to ‖p‖² in the mean over draws, whatever the width.
            features = features * math.sqrt(math.prod(layers[0].shape[1:]) / self.width)
        return pool_windows(features, self.window, self.stride) if self.pooling else features


def unit_channels(features: Tensor) -> Tensor:
    """Return features (B, C, H, W) divided by √(their squared length + ε²) at each position.

    Zero stays zero, and what rounding leaves of it, as of a patch of one color without its mean, stays far below one.
    """
    return features / (features.square().sum(1, keepdim=True) + _LEAST_LENGTH**2).sqrt()
