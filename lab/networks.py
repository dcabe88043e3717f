"""Networks that several scripts measure on: a small one for MNIST, and a ResNet-20 whose trained weights others published."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_netsim._checks import expected

# The mean and deviation of the colors of ImageNet, which published networks expect to be taken out.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallNetwork(nn.Sequential):
    """Map images of 28×28 pixels to ten logits, by two convolutions with stride 2 and two linear layers: 27,690 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, kernel_size=3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: where the size changes, pixels are skipped and channels padded.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, option A. ReLU is never in place: hooks of
    other packages do not bear it.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (B, channels, H/stride, W/stride)."""
        shortcut = x
        if self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        residual = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(residual)) + shortcut)


class ResNet20(nn.Module):
    """Map images (B, 3, 32, 32) to ten logits: three stages of three blocks, 16, 32 and 64 channels, 269,722 parameters.

    Names are those of the published weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (B, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def load_resnet20(data_dir: str | Path) -> ResNet20:
    """Return the network with the weights of `weights/resnet20-12fca82f.th`, in evaluation mode.

    Raises:
        NetsimError: if there is no such file.
    """
    path = Path(data_dir, "weights", "resnet20-12fca82f.th")
    if not path.is_file():
        raise expected("data_dir", "a directory with weights/resnet20-12fca82f.th in it", repr(str(data_dir)))
    network = ResNet20()
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return network.eval()
