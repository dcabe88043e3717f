"""Read weights of VGG-19 that were trained with another preprocessing, as those of torchvision's VGG-19.

The file is the encoder of Gatys et al. with normalized activations, up to relu3_1, as it is passed around with style-transfer
code: an image with colors in [0, 1] goes first through a convolution of 1×1 pixel that scales and reorders the colors and
subtracts their mean; borders are padded by reflection.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lab.networks import IMAGENET_MEAN, IMAGENET_STD
from lightning_netsim._checks import expected

# Layers of the file and of torchvision, from conv1_1 to conv3_1.
PLACES = {2: 0, 5: 2, 9: 5, 12: 7, 16: 10}
LAYERS = ("conv1_2", "conv2_2", "conv3_1")


def read_vgg_weights(path: str | Path, data_dir: str | Path = "") -> dict[str, Tensor]:
    """Return a state dict for torchvision's VGG-19, from conv1_1 to conv3_1, whose input has torchvision's normalization.

    With A and a the weight and bias of the 1×1 convolution, W and b those of conv1_1 and x = std·x_n + mean, conv1_1 sees
    A x + a, so that on x_n its weight is W A diag(std) and its bias b + Σ_position W (A mean + a). Features are those of the
    original wherever no border is seen: borders are padded with zeros there, by reflection in the original.

    Args:
        path: the file, or nothing; its keys are 0.weight (3, 3, 1, 1), 2.weight (64, 3, 3, 3), 5, 9, 12, 16, and biases.
        data_dir: where `weights/vgg19_normalised_conv3_1.pth` is read if no file is named.

    Returns:
        `features.0.weight`, `features.0.bias` and so on for 0, 2, 5, 7, 10, float32.

    Raises:
        NetsimError: if there is no such file, or it holds something else.
    """
    path = path or Path(data_dir, "weights", "vgg19_normalised_conv3_1.pth")
    if not Path(path).is_file():
        raise expected(
            "weights",
            "a file with the weights of VGG-19 (normalized) up to conv3_1",
            f"{str(path)!r}, which does not exist",
            "Name the file, vgg19_normalised_conv3_1.pth, with --weights.",
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    missing = [f"{place}.{kind}" for place in (0, *PLACES) for kind in ("weight", "bias") if f"{place}.{kind}" not in state]
    if missing:
        raise expected("weights", "a state dict with the keys 0.weight, 0.bias, ..., 16.bias", f"one without {missing[0]}")
    found = {
        f"features.{there}.{kind}": state[f"{here}.{kind}"].float()
        for here, there in PLACES.items()
        for kind in ("weight", "bias")
    }
    color, shift = state["0.weight"].double().flatten(1), state["0.bias"].double()
    first = state["2.weight"].double()
    mean, std = (torch.tensor(some, dtype=torch.float64) for some in (IMAGENET_MEAN, IMAGENET_STD))
    weight = torch.einsum("ochw,cd,d->odhw", first, color, std)
    bias = state["2.bias"].double() + first.sum(dim=(2, 3)) @ (color @ mean + shift)
    return found | {"features.0.weight": weight.float(), "features.0.bias": bias.float()}
