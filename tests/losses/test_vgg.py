"""Features of VGG: those of torchvision's networks with the same weights, what is drawn in their place, and bad files."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg

from lightning_netsim import NetsimError
from lightning_netsim.losses import VGGLoss
from lightning_netsim.losses import vgg as room

CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
DEFAULT = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
SHALLOW: dict[str, Any] = {"network": "vgg11", "layers": ["conv1_1", "conv2_1"]}


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 14, 13), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(network: str, parts: int | None = None, seed: int = 0) -> nn.Sequential:
    """Return the convolutional part of torchvision's network, or its first parts, with random weights and statistics."""
    torch.manual_seed(seed)
    features = vgg.make_layers(vgg.cfgs[CONFIGURATIONS[network.removesuffix("_bn")]], network.endswith("_bn"))[:parts]
    for part in features:
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight, part.running_var):
                nn.init.uniform_(value, 0.5, 2)  # type: ignore[arg-type]
            for value in (part.bias, part.running_mean):
                nn.init.normal_(value, std=0.3)  # type: ignore[arg-type]
    return features.eval().requires_grad_(False)


def state_of(features: nn.Sequential) -> dict[str, Tensor]:
    return {f"features.{name}": value for name, value in features.state_dict().items()}


def slow_loss(
    features: nn.Sequential,
    input: Tensor,
    target: Tensor,
    layers: tuple[str, ...],
    normalize: bool = True,
    average: bool = False,
) -> Tensor:
    """Return Σ over layers of the mean over positions of ‖f − f'‖², shape (B,), part after part in float64."""
    features = copy.deepcopy(features).double()
    sides = []
    for image in (input, target):
        x = (image - image.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / image.new_tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
        found, block, number = {}, 1, 0
        for part in features:
            if isinstance(part, nn.MaxPool2d):
                x, block, number = (nn.AvgPool2d(2)(x) if average else part(x)), block + 1, 0
            elif isinstance(part, nn.ReLU):
                x, number = x.clamp_min(0), number + 1
                found[f"conv{block}_{number}"] = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() if normalize else x
            else:
                x = part(x)
        sides.append(found)
    return sum((sides[0][name] - sides[1][name]).square().sum(1).mean((1, 2)) for name in layers)  # type: ignore[return-value]


def check(found: Tensor, wanted: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    for leaf in leaves:
        mine, other = (torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in (found, wanted))
        assert float((mine - other).norm()) <= 1e-8 * float(other.norm())
        assert float(other.norm()) > 0


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("network", "parts"), [("vgg11", 8), ("vgg13_bn", 10)])
def test_features_are_those_of_the_network_in_the_file(
    network: str, parts: int, normalize: bool, pooling: str, tmp_path: Path
) -> None:
    features, layers = made(network, parts), {"vgg11": ("conv1_1", "conv3_1"), "vgg13_bn": ("conv1_2", "conv2_1")}[network]
    torch.save(state_of(features), tmp_path / "weights.pth")
    input, target = images(0).requires_grad_(), images(1).requires_grad_()
    wanted = slow_loss(features, input, target, layers, normalize, pooling == "average")
    arguments: dict[str, Any] = {"network": network, "layers": list(layers), "normalize": normalize, "pooling": pooling}
    check(VGGLoss(tmp_path / "weights.pth", reduction="none", **arguments)(input, target), wanted, input, target)
    for weights in (str(tmp_path / "weights.pth"), state_of(features)):
        check(VGGLoss(weights, **arguments)(input, target), wanted.mean())


def test_the_layers_of_the_paper_unless_told() -> None:
    features = made("vgg19", 34)  # Up to the third convolution of the fifth block.
    input, target = images(2, 1, 3, 32, 33), images(3, 1, 3, 32, 33)
    check(VGGLoss(state_of(features))(input, target), slow_loss(features, input, target, DEFAULT).mean())


def test_names_of_layers() -> None:
    counts = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
    assert (*counts, *(f"{name}_bn" for name in counts)) == room.NETWORKS
    for network, numbers in counts.items():
        names = [f"conv{block}_{number + 1}" for block, count in enumerate(numbers, 1) for number in range(count)]
        for bare in (network, f"{network}_bn"):
            with pytest.raises(
                NetsimError, match="Expected `layers` to be one of " + ", ".join(map(repr, names)) + ", but got"
            ):
                VGGLoss(mode="random", network=bare, layers=["conv9_9"])


# Random weights


def drawn(network: str, parts: int, seed: int, first: nn.Conv2d | None = None) -> nn.Sequential:
    """Return a network with normal weights of variance 2 over the inputs of a unit, drawn in turn, and no biases."""
    features, generator = made(network, parts), torch.Generator().manual_seed(seed)
    for place, part in enumerate(features):
        if isinstance(part, nn.Conv2d) and place == 0 and first is not None:
            part.load_state_dict(first.state_dict())
        elif isinstance(part, nn.Conv2d):
            part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * (2 / (part.in_channels * 9)) ** 0.5)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()
    return features


@pytest.mark.parametrize(("network", "parts"), [("vgg11", 5), ("vgg11_bn", 7)])
def test_random_is_drawn_once_by_the_seed(network: str, parts: int) -> None:
    input, target = images(6), images(7)
    criterion = VGGLoss(mode="random", network=network, layers=["conv1_1", "conv2_1"], seed=5)
    wanted = slow_loss(drawn(network, parts, 5), input, target, ("conv1_1", "conv2_1")).mean()
    for mode in (True, True, False, True):
        torch.testing.assert_close(criterion.train(mode)(input, target), wanted, rtol=1e-9, atol=0)
    other = VGGLoss(mode="random", network=network, layers=["conv1_1", "conv2_1"], seed=6)(input, target)
    assert float(other) != pytest.approx(float(wanted), rel=1e-3)


def test_first_trained_keeps_the_first_convolution_of_the_file_and_redraws_the_rest() -> None:
    input, target, trained = images(10), images(11), made("vgg11", 1)
    state = state_of(trained)
    assert list(state) == ["features.0.weight", "features.0.bias"]
    criterion = VGGLoss(state, mode="first_trained", seed=5, **SHALLOW)
    wanted = slow_loss(drawn("vgg11", 5, 5, trained[0]), input, target, ("conv1_1", "conv2_1")).mean()  # type: ignore[arg-type]
    torch.testing.assert_close(criterion.eval()(input, target), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(criterion.train()(input, target), wanted, rtol=1e-9, atol=0)
    assert len({float(criterion(input, target)) for _ in range(3)}) == 3
    # Of the first convolution alone, nothing is redrawn.
    shallow = VGGLoss(state, mode="first_trained", network="vgg11", layers=["conv1_1"])
    (value,) = {float(shallow(input, target)) for _ in range(3)}
    assert value == float(VGGLoss(state, network="vgg11", layers=["conv1_1"])(input, target))


def test_a_trained_network_is_as_it_is_in_the_file() -> None:
    state, input, target = state_of(made("vgg11", 5)), images(12), images(13)
    before = {name: value.clone() for name, value in state.items()}
    criterion = VGGLoss(state, **SHALLOW)
    assert len({float(criterion.train(mode)(input, target)) for mode in (True, False, True)}) == 1
    assert float(VGGLoss(state, seed=9, **SHALLOW)(input, target)) == float(criterion(input, target))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_it_is_frozen_and_no_part_of_checkpoints() -> None:
    holder = nn.Module()
    holder.loss = VGGLoss(state_of(made("vgg11", 5)), **SHALLOW)
    assert list(holder.parameters()) == list(holder.buffers()) == []
    assert not holder.state_dict()
    x = images(14).float().requires_grad_()
    loss = holder.loss(x, images(15).float())
    loss.backward()
    assert x.grad is not None
    assert bool(x.grad.any())


# Bad files


def test_a_file_from_parallel_training_and_an_ordered_one(tmp_path: Path) -> None:
    state, input, target = state_of(made("vgg11", 5)), images(21), images(22)
    wanted = VGGLoss(state, **SHALLOW)(input, target)
    for number, other in enumerate((OrderedDict(state), {f"module.{name}": value for name, value in state.items()})):
        torch.save(other, tmp_path / f"{number}.pth")
        assert torch.equal(VGGLoss(tmp_path / f"{number}.pth", **SHALLOW)(input, target), wanted)


class Foreign:
    """What a file must not make."""


def bad_file(path: Path, kind: str) -> Path:
    if kind == "text":
        path.write_text("no weights")
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "cut":
        torch.save(state_of(made("vgg11", 5)), path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind != "missing":
        torch.save({"list": [1, 2], "tensor": torch.ones(3), "object": Foreign()}[kind], path)
    return path


@pytest.mark.parametrize("mode", ["trained", "first_trained"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file or directory"),
        ("directory", "Is a directory"),
        ("text", "not readable"),
        ("empty", "not readable"),
        ("cut", "not readable"),
        ("object", "not readable"),
        ("list", "a list in"),
        ("tensor", "a Tensor in"),
    ],
)
def test_a_file_that_is_none_of_weights(kind: str, reason: str, mode: str, tmp_path: Path) -> None:
    path = bad_file(tmp_path / "weights.pth", kind)
    with pytest.raises(NetsimError, match="Expected `weights` to be the file of a state dict of torchvision's vgg11") as caught:
        VGGLoss(path, mode, **SHALLOW)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_lacks_a_layer_or_is_of_another_network() -> None:
    state = state_of(made("vgg11", 5))
    VGGLoss(state, **SHALLOW)
    with pytest.raises(
        NetsimError, match=r"with `features.6.weight` of shape \(256, 128, 3, 3\), but got none. Choose the `network`"
    ):
        VGGLoss(state, network="vgg11", layers=["conv3_1"])
    with pytest.raises(
        NetsimError, match=r"torchvision's vgg13 with `features.2.weight` of shape \(64, 64, 3, 3\), but got none"
    ):
        VGGLoss(state, network="vgg13", layers=["conv1_2"])
    with pytest.raises(NetsimError, match=r"`features.3.weight` of shape \(128, 64, 3, 3\), but got shape \(128, 64, 1, 1\)"):
        VGGLoss(state | {"features.3.weight": torch.ones(128, 64, 1, 1)}, **SHALLOW)
    with pytest.raises(NetsimError, match=r"`features.0.bias` of shape \(64,\), but got none"):
        VGGLoss({"features.0.weight": state["features.0.weight"]}, mode="first_trained", **SHALLOW)
    with pytest.raises(NetsimError, match=r"torchvision's vgg11_bn with `features.1.weight`"):
        VGGLoss(state, network="vgg11_bn", layers=["conv1_1"])
    with pytest.raises(NetsimError, match=r"`features.0.weight` of shape \(64, 3, 3, 3\), but got none"):
        VGGLoss({"features.0.weight": "no tensor"}, **SHALLOW)  # type: ignore[dict-item]


IMAGE = torch.rand(1, 3, 20, 16)


def test_the_smallest_images_that_do() -> None:
    criterion = VGGLoss(mode="random", network="vgg11", layers=["conv3_1"])
    assert float(criterion(IMAGE[..., :4, :4], IMAGE[..., 4:8, :4])) > 0
    gray = IMAGE[:, :1].expand(-1, 3, -1, -1)
    assert float(criterion(gray, IMAGE)) > 0
