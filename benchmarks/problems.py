"""The two networks and image sets that the benchmarks measure on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from lab.data import read_cifar
from lab.networks import IMAGENET_MEAN, IMAGENET_STD, ResNet20, load_resnet20
from lab.training import take_step
from lightning_netsim._checks import NetsimError
from lightning_netsim.demos import MNISTNetwork
from lightning_netsim.jacobian import Directions

TRAINING_STEPS = 300

Function = Callable[..., Tensor]
"""Of tensors; its value is one number."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, and images that become numbers one chunk at a time.

    Attributes:
        network: in evaluation mode.
        images: shape (N, channels, height, width), uint8.
        what: what the images and the weights are, for print.
        mean: of each channel, subtracted from images in [0, 1].
        std: of each channel, by which they are then divided.
        chunk_size: images differentiated at a time.
        direction: that which `GradientFeatures(directions=1, seed=0)` draws, shape (10, 1).
    """

    network: nn.Module
    images: Tensor
    what: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    chunk_size: int = 64
    direction: Tensor = field(default_factory=lambda: torch.as_tensor(Directions(1, seed=0).matrix(10)).float())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def first(self, number: int) -> Problem:
        """Return the same with the first N images."""
        return replace(self, images=self.images[:number])

    def inputs(self, images: Tensor | None = None) -> Tensor:
        """Return what the network takes for images, by default all, shape (N, channels, height, width), float32."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((self.images if images is None else images).float() / 255 - mean) / std

    def chunks(self, chunk_size: int | None = None) -> Iterator[Tensor]:
        """Yield the inputs, `chunk_size` images at a time."""
        for images in self.images.split(chunk_size or self.chunk_size):
            yield self.inputs(images)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the inputs as a data loader, in their order."""
        return DataLoader(TensorDataset(self.inputs()), batch_size=self.chunk_size)


def value_and_gradients(function: Function, *inputs: Tensor, of: int | None = None) -> tuple[Tensor, ...]:
    """Return the value of a function and its gradients with respect to its inputs, or to the first `of` of them."""
    leaves = [some.detach().requires_grad_() for some in inputs[:of]]
    value = function(*leaves, *inputs[len(leaves) :])
    return value.detach(), *torch.autograd.grad(value, leaves)


def largest_difference(functions: Iterable[Function], *inputs: Tensor) -> float:
    """Return by how much functions differ from the first one in value and gradients, relative to it, at most."""
    first, *others = (value_and_gradients(function, *inputs) for function in functions)
    return max(float((b - a).norm() / a.norm()) for other in others for a, b in zip(first, other, strict=True))


def random_images(number: int, shape: tuple[int, ...]) -> Tensor:
    """Return N images of random pixels, shape (N, *shape), uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, *shape), dtype=torch.uint8, generator=generator)


def mnist(data_dir: str, number: int, steps: int = TRAINING_STEPS, chunk_size: int = 64) -> Problem:
    """Return N MNIST images and the network of 317,069 parameters, trained briefly.

    Args:
        data_dir: the directory with `MNIST/raw` in it; where there is none, images and weights are random, which is said.
        number: N. Up to 10,000 images come from the test set, more from the training set.
        steps: training steps of 64 images; 0 leaves the initial weights, which cost the same time and memory.
        chunk_size: images differentiated at a time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MNISTNetwork()
    images, what = random_images(number, (1, 28, 28)), "random images, initial weights"
    with contextlib.suppress(RuntimeError):
        train = MNIST(data_dir, train=True)
        part, chosen = ("test", MNIST(data_dir, train=False)) if number <= 10_000 else ("training", train)
        images = chosen.data[:number].unsqueeze(1).clone()
        what = f"MNIST {part} images, " + (f"weights after {steps} training steps" if steps else "initial weights")
        generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(steps):
            batch = torch.randint(len(train), (64,), generator=generator)
            inputs = train.data[batch].unsqueeze(1).float() / 255
            take_step(optimizer, F.cross_entropy(network(inputs), train.targets[batch]))
        optimizer.zero_grad()
    return Problem(network.eval(), images, what, chunk_size=chunk_size)


def cifar(data_dir: str, number: int, chunk_size: int = 64) -> Problem:
    """Return N CIFAR-10 images and the trained ResNet-20.

    Args:
        data_dir: the directory with `cifar10/cifar10_subset.npz` and `weights/resnet20-12fca82f.th` in it; what is missing is
            replaced by random images or initial weights, which is said.
        number: N. Up to 1,000 images come from the test set, up to 4,000 from the training set.
        chunk_size: images differentiated at a time.
    """
    try:
        network, trained = load_resnet20(data_dir), "trained weights"
    except NetsimError:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, trained = ResNet20().eval(), "initial weights"
    images, what = random_images(number, (3, 32, 32)), "random images"
    part = "test" if number <= 1_000 else "train"
    with contextlib.suppress(NetsimError):
        found = read_cifar(data_dir, part)[0][:number]
        if len(found) == number:
            images, what = found, f"CIFAR-10 {part}{'ing' if part == 'train' else ''} images"
    return Problem(network, images, f"{what}, {trained}", IMAGENET_MEAN, IMAGENET_STD, chunk_size)
