"""Enlarge photographs four times: the network, and the module that trains it by any loss of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchvision.transforms.v2.functional import center_crop
from torchvision.utils import make_grid, save_image

from lightning_netsim._checks import check_positive_int, check_positive_number
from lightning_netsim.demos.photographs import SCALE, PhotographBatch, upscale
from lightning_netsim.losses import AbstractImageLoss
from lightning_netsim.mixins.regularized import made_criterion, plain

ImageCriterion = AbstractImageLoss | Callable[..., Any]
"""A loss of images, or a function (input, target) -> scalar."""


class ResidualBlock(nn.Module):
    """Add to an image of features what two 3×3 convolutions make of it.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(first, nn.BatchNorm2d(width), nn.PReLU(), second, nn.BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        added: Tensor = self.layers(features)
        return features + added


class SuperResolutionNetwork(nn.Module):
    """Enlarge color images four times: the generator of SRGAN (SRResNet), its last convolution 3×3.

    A 9×9 convolution, residual blocks of two 3×3 convolutions with batch norm and a PReLU between them, one more convolution
    with batch norm, and the output of the first convolution is added. Twice, a convolution and a pixel shuffle double the
    sides. The published network has 16 blocks of width 64, and learns for 125,000 steps.

    Args:
        num_blocks: residual blocks, >= 1.
        width: channels of all layers in between, >= 1.
        adds_bicubic: whether the output is added to the bicubic enlargement, so that a few thousand steps are enough to do
            better than that. The published network does not.

    Source: Ledig et al., CVPR 2017, figure 4; the last convolution as in Amir and Weiss, CVPR 2021, supplement 2.3.

    Example:
        >>> import torch
        >>> network = SuperResolutionNetwork(num_blocks=1, width=8)
        >>> network(torch.rand(2, 3, 12, 10)).shape
        torch.Size([2, 3, 48, 40])
    """

    def __init__(self, num_blocks: int = 4, width: int = 32, adds_bicubic: bool = True) -> None:
        super().__init__()
        check_positive_int("num_blocks", num_blocks)
        check_positive_int("width", width)
        self.adds_bicubic = adds_bicubic
        self.first = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        blocks = [ResidualBlock(width) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        doubled: list[nn.Module] = []
        for _ in range(int(math.log2(SCALE))):
            doubled += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]
        self.last = nn.Sequential(*doubled, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, low: Tensor) -> Tensor:
        """Return the enlarged images, shape (B, 3, 4H, 4W), of images of shape (B, 3, H, W)."""
        features = self.first(low)
        output: Tensor = self.last(features + self.blocks(features))
        return output + upscale(low) if self.adds_bicubic else output


class SuperResolver(LightningModule):
    """Train a network that enlarges photographs four times, by a loss of images beside the squared error of pixels.

    The loss is ``criterion(output, target) + pixel_weight * mean((output - target)²)``. Adam's learning rate is halved after
    each quarter of the training steps but the last. After each validation the middle of the first photograph is written as
    ``super_resolution.png`` into the directory of the logger: reduced, enlarged by bicubic interpolation, by the network, and
    as it is.

    Args:
        num_blocks: residual blocks of the network, >= 1.
        width: its channels, >= 1.
        adds_bicubic: whether it adds to the bicubic enlargement; see `SuperResolutionNetwork`.
        learning_rate: step size of Adam at the beginning, > 0.
        criterion: a loss of images of `lightning_netsim.losses`, or a function (input, target) -> scalar; None for the
            squared error of pixels alone.
        pixel_weight: of the squared error of pixels, > 0.

    Raises:
        ValueError: for a value out of range.

    Source: Amir and Weiss, Understanding and Simplifying Perceptual Distances, CVPR 2021, supplement 2.3.

    Example:
        >>> import torch
        >>> model = SuperResolver(num_blocks=1, width=8, criterion=torch.nn.L1Loss())
        >>> loss = model.training_step((torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)), 0)
    """

    def __init__(
        self,
        num_blocks: int = 4,
        width: int = 32,
        adds_bicubic: bool = True,
        learning_rate: float = 1e-3,
        criterion: ImageCriterion | None = None,
        pixel_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.learning_rate = check_positive_number("learning_rate", learning_rate)
        self.pixel_weight = check_positive_number("pixel_weight", pixel_weight)
        wanted = "a loss of images of `lightning_netsim.losses`, or a function of (input, target)"
        self.criterion = made_criterion("criterion", criterion, wanted)
        criterion = plain(criterion)  # save_hyperparameters takes the value that stands here: a checkpoint holds no module
        self.save_hyperparameters()
        self.network = SuperResolutionNetwork(num_blocks, width, adds_bicubic)
        quality = MetricCollection(
            {
                "psnr": PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)),
                "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            },
            compute_groups=False,
        )
        self.val_quality = quality.clone(prefix="val_")
        self.test_quality = quality.clone(prefix="test_")
        self._shown: PhotographBatch | None = None

    def forward(self, low: Tensor) -> Tensor:
        """Return the enlarged images, shape (B, 3, 4H, 4W)."""
        output: Tensor = self.network(low)
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the criterion plus the weighted squared error of pixels, a scalar."""
        pixels = self.pixel_weight * F.mse_loss(output, target)
        return pixels if self.criterion is None else pixels + self.criterion(output, target)

    def training_step(self, batch: PhotographBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log it as `train_loss`."""
        low, high = batch
        loss = self.loss(self(low), high)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: PhotographBatch, batch_idx: int) -> None:
        """Log `val_loss`, `val_psnr` and `val_ssim`."""
        if batch_idx == 0:
            self._shown = batch[0][:1], batch[1][:1]
        self._evaluate("val", self.val_quality, batch)

    def test_step(self, batch: PhotographBatch, batch_idx: int) -> None:
        """Log `test_loss`, `test_psnr` and `test_ssim`."""
        self._evaluate("test", self.test_quality, batch)

    def _evaluate(self, stage: str, quality: MetricCollection, batch: PhotographBatch) -> None:
        low, high = batch
        output = self(low)
        quality.update(output.clamp(0, 1), high)
        self.log(f"{stage}_loss", self.loss(output, high), prog_bar=True, batch_size=len(high))
        self.log_dict(quality, prog_bar=True, batch_size=len(high))

    def predict_step(self, batch: PhotographBatch, batch_idx: int) -> Tensor:
        """Return the enlarged images, shape (B, 3, 4H, 4W), values in [0, 1]."""
        output: Tensor = self(batch[0])
        return output.clamp(0, 1)

    def on_validation_end(self) -> None:
        """Write the picture, where there is a logger with a directory."""
        directory = self.trainer.log_dir  # Every process has to ask.
        wanted = self.trainer.is_global_zero and self.trainer.logger is not None and not self.trainer.sanity_checking
        if self._shown is not None and directory is not None and wanted:
            Path(directory).mkdir(parents=True, exist_ok=True)
            save_image(self.picture(*self._shown), Path(directory) / "super_resolution.png")
        self._shown = None

    @torch.no_grad()
    def picture(self, low: Tensor, high: Tensor, size: int = 256) -> Tensor:
        """Return the middle of one photograph, side by side: reduced, bicubic, by the network, as it is.

        Args:
            low: the reduced photograph, shape (1, 3, H/4, W/4).
            high: the photograph, shape (1, 3, H, W).
            size: sides of the part that is shown, in pixels.

        Returns:
            Shape (3, h, w), values in [0, 1].
        """
        size = min(size, *high.shape[-2:])
        coarse = F.interpolate(low, scale_factor=float(SCALE), mode="nearest")
        row = [coarse, upscale(low).clamp(0, 1), self(low).clamp(0, 1), high]
        shown: Tensor = make_grid(torch.cat([center_crop(each, [size, size]) for each in row]))
        return shown

    def configure_optimizers(self) -> Any:
        """Return Adam, its learning rate halved after one, two and three quarters of the steps."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        quarters = [int(steps * part / 4) for part in (1, 2, 3)] if math.isfinite(steps) else []
        halving = torch.optim.lr_scheduler.MultiStepLR(optimizer, quarters, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving, "interval": "step"}}
