"""Digits, networks, training and kernel of two experiments on noisy labels: `noisy_rounds.py`, `augmentation_denoises.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lab.training import take_step
from lightning_netsim import PerSampleJacobian, per_sample_jacobian
from lightning_netsim.estimators import LabelDenoising
from lightning_netsim.functional.results import LabelDenoisingResult
from lightning_netsim.jacobian.feature_batches import GradientFeatureBatch

CLASSES = 10
BATCH_SIZE, LEARNING_RATE = 50, 2e-3


def small_network(channels: int, side: int, outputs: int, convolutions: int = 2, width: int = 8) -> nn.Sequential:
    """Return a network on square images: convolutions with stride 2, a hidden layer of 48 units, ReLU."""
    layers: list[nn.Module] = []
    for number in range(convolutions):
        size = 5 if number == 0 else 3
        layers += [nn.Conv2d(channels, width * min(number + 1, 2), size, stride=2, padding=size // 2), nn.ReLU()]
        channels, side = width * min(number + 1, 2), (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 48), nn.ReLU(), nn.Linear(48, outputs))


def training(network: nn.Module, inputs: Tensor, targets: Tensor, marks: Sequence[int], seed: int) -> Iterator[int]:
    """Train by Adam, and halt at some numbers of steps; which images are in which batch depends on the seed alone.

    Args:
        network: changed in place.
        inputs: shape (N, ...).
        targets: shape (N, D), for the squared error, or (N,), int64, for cross-entropy.
        marks: after how many steps to halt; the greatest ends the training.
        seed: of the shuffling.

    Yields:
        the steps taken, at every mark.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    batches: list[Tensor] = []
    for step in range(1, max(marks) + 1):
        batches = batches or list(torch.randperm(len(inputs), generator=generator).split(BATCH_SIZE))
        batch = batches.pop()
        take_step(optimizer, loss_of(network(inputs[batch]), targets[batch]))
        if step in marks:
            yield step


def train_together(networks: Sequence[nn.Module], inputs: Tensor, targets: Tensor, steps: int, seeds: Sequence[int]) -> None:
    """Train M networks of the same shape at once, each as it would be alone; the learning rate falls linearly to zero.

    Args:
        networks: changed in place.
        inputs: shape (M, N, ...).
        targets: shape (M, N, D), or (M, N), int64.
        steps: batches in all.
        seeds: of the shuffling, M of them.
    """
    stacked, _ = stack_module_state(list(networks))
    optimizer = torch.optim.Adam(stacked.values(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    forward = vmap(lambda parameters, x: functional_call(networks[0], parameters, (x,)))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows, batches = torch.arange(len(networks)).unsqueeze(1), []
    for _ in range(steps):
        if not batches:
            order = torch.stack([torch.randperm(inputs.shape[1], generator=generator) for generator in generators])
            batches = list(order.split(BATCH_SIZE, dim=1))
        batch = batches.pop()
        outputs = forward(stacked, inputs[rows, batch])
        # Adam works entry by entry: with the sum of the losses, no network feels the others.
        take_step(optimizer, len(networks) * loss_of(outputs.flatten(0, 1), targets[rows, batch].flatten(0, 1)))
        schedule.step()
    for place, network in enumerate(networks):
        network.load_state_dict({name: value[place].detach() for name, value in stacked.items()})


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error, or with classes as targets the cross-entropy."""
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def seeded(seed: int, *arguments: int) -> nn.Sequential:
    """Return a `small_network` whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return small_network(*arguments)


class Kernel:
    """The kernel of a network on N samples: their neighbors, and what it averages over them.

    Args:
        network: maps (N, ...) to (N, D).
        inputs: the N samples.
    """

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        self.jacobian: PerSampleJacobian = per_sample_jacobian(network, inputs)

    @cached_property
    def features(self) -> GradientFeatureBatch:
        return GradientFeatureBatch(self.jacobian)

    def neighbor_fraction(self) -> Tensor:
        """Return N_S(x_i)/N, shape (N,): the mean normalized similarity of a sample to all."""
        return self.features.dot(self.features.sum()) / self.jacobian.num_samples

    def nearest(self, number: int) -> Tensor:
        """Return the places of the samples nearest to each, itself among them, shape (N, number)."""
        return self.features.inner(self.features).topk(number, dim=1).indices

    def average(
        self, targets: Tensor, outputs: Tensor, queries: Tensor | None = None, kernel: str = "matrix"
    ) -> LabelDenoisingResult:
        """Average over the neighbors by the un-normalized kernel, see `LabelDenoising`.

        Args:
            targets: shape (N, D).
            outputs: shape (N, D).
            queries: places of those that are asked about, then of all pairs; None for all, then in linear time.
            kernel: "matrix", or "outputs", where negative weights count as zero.
        """
        denoising = LabelDenoising(kernel, all_pairs=queries is not None)
        denoising.update(self.jacobian, targets, outputs)
        some = slice(None) if queries is None else queries
        denoising.query(self.jacobian.select(some), outputs[some])
        return denoising.compute()
