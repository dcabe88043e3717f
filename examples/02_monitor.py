"""Watch the representation of your own LightningModule form: one callback, and `similarity_step` to say what is compared.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits.
"""

# %% A module of one's own. Its batches are mappings, its validation step is none of the monitor's business.
from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_netsim import SimilarityBatch, SimilarityMonitor, load_run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=400, help="how many images to compare")
parser.add_argument("--epochs", type=int, default=2, help="epochs of training")
parser.add_argument("--out", default="runs/monitor_example", help="where tables and figures go")
options = parser.parse_args()


class DigitsModule(LightningModule):
    """A classifier whose batches are mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.head(self.body(batch["image"])), batch["digit"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def similarity_step(self, batch: dict[str, Any], batch_idx: int) -> SimilarityBatch:
        """Say what is compared: the logits; and what is known of the samples."""
        outputs = self.head(self.body(batch["image"]))
        return SimilarityBatch(outputs, labels=batch["digit"], ids=batch["name"], inputs=batch["image"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% Train with the monitor attached.
digits = load_digits()
samples = [
    {"image": torch.tensor(image, dtype=torch.float32).unsqueeze(0) / 16, "digit": int(digit), "name": f"scan-{number:04d}"}
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True))
]
trainer = Trainer(
    max_epochs=options.epochs,
    callbacks=[SimilarityMonitor(k=5, max_samples=options.samples)],
    logger=CSVLogger(options.out),
    log_every_n_steps=10,
)
trainer.fit(
    DigitsModule(),
    DataLoader(samples[:1200], batch_size=64, shuffle=True),
    DataLoader(samples[1200:], batch_size=64),
)

# %% The tables of the last epoch, read back from disk.
run = load_run(str(trainer.log_dir))
print(
    run.samples.nsmallest(5, "neighbor_fraction")[["sample_id", "label", "prediction", "neighbor_fraction"]].to_string(
        index=False
    )
)
