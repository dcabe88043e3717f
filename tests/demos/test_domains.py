"""Two domains of MNIST: one with labels, the other before backgrounds and without."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

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


def test_training_sees_both_domains_and_validation_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    white = torch.zeros(60, 1, 28, 28)
    white[torch.arange(60), 0, 0, torch.arange(60) % 28] = 1  # A stroke that tells images apart.
    numbered = TensorDataset(white, torch.arange(60))
    monkeypatch.setattr(ShiftedMNISTDataModule, "load_sets", lambda self: (numbered, numbered))
    data = ShiftedMNISTDataModule("nowhere", batch_size=30)
    data.setup("fit")
    loaders = data.train_dataloader()
    images, labels = next(iter(loaders["source"]))
    assert sorted(labels.tolist()) == list(range(0, 60, 2))
    assert torch.equal(images, white[labels])
    [target] = data.target_set.tensors
    assert [len(batch[0]) for batch in loaders["target"]] == [30]
    assert bool((target >= white[1::2]).all())
    assert target.mean() > 0.1
    judged, truth = next(iter(data.val_dataloader()))
    assert truth.tolist() == list(range(30))
    assert judged.mean() > 0.1
    again = ShiftedMNISTDataModule("nowhere", batch_size=30)
    again.setup("fit")
    assert torch.equal(next(iter(again.val_dataloader()))[0], judged)
