"""Compare two images by the features of a VGG network, trained or random."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lightning_netsim._checks import check_choice, expected
from lightning_netsim.losses.image import AbstractImageLoss, reduce_windows
from lightning_netsim.losses.random_network import unit_channels

NETWORKS = tuple(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19))
MODES = ("trained", "random", "redrawn", "first_trained")
# What torchvision's networks were trained with, for pixels in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGGLoss(AbstractImageLoss):
    """Compute the squared distance of two images in the features of a VGG network, Σ over layers of the mean over positions.

    Features are taken after the activation of each layer, and divided by their length at each position. No weights are fetched,
    and none are made up: a trained network needs a file, and a random one has to be asked for. The network is frozen, and no
    part of checkpoints.

    Args:
        weights: the file of a state dict of torchvision's network, for example ``vgg19-dcbb9e9d.pth``, or that dict; only the
            layers that are used have to be in it. Needed where a layer is trained.
        mode: "trained"; "random", drawn once by the seed; "redrawn", anew at each call in training mode; or "first_trained",
            the first convolution trained and all others redrawn. Random weights are of He initialization, without biases.
        network: a VGG of torchvision: "vgg11", "vgg13", "vgg16" or "vgg19", or one of these with "_bn".
        layers: which are compared: "conv3_2" is the second convolution of the third block.
        normalize: divide features by their length at each position.
        pooling: "max" as in VGG, or "average".
        value_range: the least and the greatest value of pixels; inside, the means and deviations of ImageNet are used.
        reduction: "mean" over the images, or "none".
        seed: of the draws, which begin anew where a run is resumed.

    Raises:
        NetsimError: a trained network without a file, a file that cannot be read or lacks a layer, an unknown word; later, for
            images that do not have three channels, or are too small.

    Source: Simonyan and Zisserman, ICLR 2015; Johnson et al., ECCV 2016; per-position normalization: Zhang et al., CVPR 2018;
    layers, random and redrawn networks: Amir and Weiss, CVPR 2021.

    Example:
        >>> loss = VGGLoss(mode="random", layers=["conv1_2", "conv2_2"])
        >>> image = torch.rand(1, 3, 32, 32)
        >>> loss(image, image).item()
        0.0
        >>> VGGLoss()
        Traceback (most recent call last):
        lightning_netsim._checks.NetsimError: Expected `weights` to be the file of a state dict of torchvision's vgg19, ...
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        mode: str = "trained",
        network: str = "vgg19",
        layers: Sequence[str] = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"),
        normalize: bool = True,
        pooling: str = "max",
        value_range: Sequence[float] = (0.0, 1.0),
        reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(value_range, mode in ("redrawn", "first_trained"), reduction, seed)
        # Of a dict, checkpoints and print-outs get the name alone.
        self.weights = "a state dict" if isinstance(weights, Mapping) else None if weights is None else os.fspath(weights)
        self.mode = check_choice("mode", mode, MODES)
        if weights is not None and mode in ("random", "redrawn"):
            raise expected("weights", f"None with mode {mode!r}, where all are drawn", repr(self.weights), "Choose 'trained'?")
        self.network = check_choice("network", network, NETWORKS)
        self.normalize = normalize
        self.pooling = check_choice("pooling", pooling, ("max", "average"))
        parts = _parts(network)
        if isinstance(layers, str) or not layers:
            raise expected("layers", "a list of one or more layers", repr(layers))
        self.layers = [check_choice("layers", layer, parts.values()) for layer in layers]
        self._taken = [place for place, name in parts.items() if name in self.layers]
        self._deepest = parts[self._taken[-1]]
        features = _features(network)[: self._taken[-1] + 1].to_empty(device="cpu")
        features = nn.Sequential(*(self._made(part) for part in features)).eval().requires_grad_(False)
        convolutions = [place for place, part in enumerate(features) if isinstance(part, nn.Conv2d)]
        trained = {"trained": list(range(len(features))), "first_trained": convolutions[:1]}.get(mode, [])
        if trained:
            _load(features, trained, _read(weights, network), network)
        drawn = [part for place, part in enumerate(features) if place not in trained]
        self._random = [part for part in drawn if isinstance(part, nn.Conv2d)]
        # In a tuple, it is no part of the state: not trained, not saved.
        self._network = (features,)
        self._holds_first = False

    def compute(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[1] != 3:
            remedy = "Repeat a gray image: `images.expand(-1, 3, -1, -1)`."
            raise expected("input", "images of three channels, as VGG takes", f"{input.shape[1]} channels", remedy)
        with torch.inference_mode(False):  # What is moved or drawn there could not be trained through afterwards.
            network = self._network[0].to(input)
            self._draw()
        halvings = sum(isinstance(part, nn.MaxPool2d | nn.AvgPool2d) for part in network)
        if min(input.shape[2:]) < 2**halvings:
            wanted = f"images of at least {2**halvings} pixels, which {self._deepest} wants"
            raise expected("input", wanted, f"{input.shape[2]}×{input.shape[3]}", "Leave out deeper layers.")
        total = input.new_zeros(())
        for first, second in zip(self._features_of(input, network), self._features_of(target, network), strict=True):
            total = total + reduce_windows((first - second).square().sum(1), self.reduction)
        return total

    def _features_of(self, images: Tensor, network: nn.Sequential) -> Iterator[Tensor]:
        """Yield the features of each layer that is compared."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        features = ((images + 1) / 2 - mean) / std
        for place, part in enumerate(network):
            features = part(features)
            if place in self._taken:
                yield unit_channels(features) if self.normalize else features

    def _draw(self) -> None:
        """Draw what is random, unless that has been done."""
        is_new = self.redraw and self.training
        if not self._random or (self._holds_first and not is_new):
            return
        generator = self._drawing()
        for convolution in self._random:
            weight = convolution.weight
            normal = torch.randn(weight.shape, generator=generator) * math.sqrt(2 / weight[0].numel())
            # Replaced, and not written to: the graph of an earlier call may hold the old ones.
            convolution.weight = nn.Parameter(normal.to(weight), requires_grad=False)
            convolution.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
        self._holds_first = not is_new

    def _made(self, part: nn.Module) -> nn.Module:
        """Return a part of the network as it is used: nothing in place, and the pooling that was chosen."""
        if isinstance(part, nn.ReLU):
            return nn.ReLU()
        if isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()
            return part
        return nn.AvgPool2d(2) if isinstance(part, nn.MaxPool2d) and self.pooling == "average" else part


def _features(network: str) -> nn.Sequential:
    """Return the convolutional part of a network of torchvision, without memory."""
    from torchvision import models

    with torch.device("meta"):
        features: nn.Sequential = getattr(models, network)(weights=None).features
    return features


def _parts(network: str) -> dict[int, str]:
    """Return for each activation its place in the network and the name of its convolution."""
    names, block, number = {}, 1, 0
    for place, part in enumerate(_features(network)):
        if isinstance(part, nn.MaxPool2d):
            block, number = block + 1, 0
        elif isinstance(part, nn.ReLU):
            number += 1
            names[place] = f"conv{block}_{number}"
    return names


def _read(weights: str | os.PathLike[str] | Mapping[str, Tensor] | None, network: str) -> Mapping[str, Any]:
    """Return a state dict."""
    wanted = f"the file of a state dict of torchvision's {network}"
    if isinstance(weights, Mapping):
        return weights
    if weights is None:
        remedy = "Fetch one, for example from torchvision's page of VGG, or take a random network by `mode='redrawn'`."
        raise expected("weights", f"{wanted}, for a network that is trained", "None", remedy)
    path = Path(weights)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"not readable: {type(error).__name__}"
        raise expected("weights", wanted, f"{str(path)!r} ({reason})") from error
    if not isinstance(state, Mapping):
        raise expected("weights", wanted, f"a {type(state).__name__} in {str(path)!r}")
    return state


def _load(features: nn.Sequential, places: list[int], state: Mapping[str, Any], network: str) -> None:
    """Copy the weights of some places from a state dict."""
    for place in places:
        for name, value in features[place].state_dict().items():
            key = f"features.{place}.{name}"
            found = state.get(key, state.get(f"module.{key}"))
            if not isinstance(found, Tensor) or found.shape != value.shape:
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "none"
                wanted = f"a state dict of torchvision's {network} with `{key}` of shape {tuple(value.shape)}"
                remedy = "Choose the `network` that the file is of, or leave out deeper `layers`."
                raise expected("weights", wanted, got, remedy)
            value.copy_(found)
