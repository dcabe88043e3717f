"""What trainings of small networks have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step against the gradient of a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified as their label says."""
    predicted = torch.cat([network(some).argmax(1) for some in images.split(500)])
    return float((predicted == labels).double().mean())
