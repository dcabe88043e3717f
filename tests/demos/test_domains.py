"""Two domains of MNIST: one with labels, the other before backgrounds and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_netsim import NetsimError
from lightning_netsim.demos import ShiftedMNISTDataModule
from lightning_netsim.demos.domains import before_clouds


def test_backgrounds_leave_strokes_as_they_are() -> None:
    images = torch.zeros(6, 1, 28, 28)
    images[:, :, 10:14] = 1
    clouded = before_clouds(images, torch.Generator().manual_seed(0))
    assert torch.equal(clouded[:, :, 10:14], images[:, :, 10:14])
    background = clouded[:, :, :10]
    assert background.min() >= 0
    assert background.max() <= 0.5
    assert (background.std((2, 3)) > 0.05).all()
    # It varies smoothly, and from image to image.
    assert background.diff(dim=3).abs().max() < 0.15
    assert not torch.allclose(clouded[0], clouded[1])


def test_training_sees_both_domains_and_validation_the_target(data_dir: Path) -> None:
    data = ShiftedMNISTDataModule(str(data_dir), batch_size=16)
    data.setup("fit")
    assert len(data.train_set) == len(data.target_set) == 30_000
    batches = {name: next(iter(loader)) for name, loader in data.train_dataloader().items()}
    images, labels = batches["source"]
    assert images.shape == (16, 1, 28, 28)
    assert labels.shape == (16,)
    [target] = batches["target"]
    assert target.shape == images.shape
    assert target.mean() > images.mean() + 0.1
    judged, _ = next(iter(data.val_dataloader()))
    assert judged.mean() > images.mean() + 0.1
    again = ShiftedMNISTDataModule(str(data_dir), batch_size=16)
    again.setup("fit")
    assert torch.equal(next(iter(again.val_dataloader()))[0], judged)


def test_missing_data_is_said() -> None:
    with pytest.raises(NetsimError, match="`data_dir` to be a directory with MNIST/raw in it"):
        ShiftedMNISTDataModule("nowhere").prepare_data()
