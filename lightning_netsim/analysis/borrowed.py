"""Use somebody's model for a while, and leave it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_netsim._checks import expected
from lightning_netsim.data import trees
from lightning_netsim.data.samples import Move
from lightning_netsim.jacobian.isolation import mute, unchanged
from lightning_netsim.measurement.progress import Progress, progress_bar


@contextmanager
def borrowed(model: nn.Module, progress: bool) -> Iterator[Progress]:
    """Put a model in eval mode for the time of the block, leave it and all random states as they were, and show progress."""
    with isolate_rng(), unchanged(model), progress_bar() if progress else nullcontext() as tell:
        model.eval()
        mute(model, LightningModule)
        yield tell or (lambda stage, done, total: None)


def to_device_of(model: nn.Module) -> Move:
    """Return the function that brings batches to where the parameters of a model are."""
    if not isinstance(model, nn.Module):
        raise expected("model", "a LightningModule or another nn.Module", type(model).__name__)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return lambda batch, number: trees.moved(batch, device)
