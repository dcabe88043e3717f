"""Learn embeddings on some digits, judge them on others, keep the classes equally far apart: one term, by each way in.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits, and the
extra `metric-learning` for losses by name.
"""

# %% Data and a network: 8×8 scans of digits; training sees the digits 0 to 4 only.
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import ContrastiveMixin, DifferenceAlignmentMixin, EmbeddingMetrics
from lightning_netsim.cli import main
from lightning_netsim.estimators import LinearProbe
from lightning_netsim.functional import ctv_norm, difference_alignment_loss
from lightning_netsim.losses import DifferenceAlignmentLoss, MetricLearningLoss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=1797, help="how many images to take")
parser.add_argument("--epochs", type=int, default=15, help="epochs of training")
parser.add_argument("--out", default="runs/embeddings_example", help="where the run from YAML goes")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images[: options.samples], dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target[: options.samples])
seen = labels < 5

# %% Functions: of embeddings, however they were computed.
distances = torch.tensor([[1.0], [1.0], [1.5]])
print(f"function: the CTV norm of the distances 1, 1 and 1.5 is {ctv_norm(distances):.1f}")
print(f"function: images themselves, {difference_alignment_loss(images[:64], labels[:64]):.3f}")

# %% A module, in a plain training step: any loss, and the term beside it.
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
loss = MetricLearningLoss("NPairsLoss")(network(images[:64]), labels[:64])
term = DifferenceAlignmentLoss()(network(images[:64]), labels[:64])
(loss + term).backward()
print(f"module:   N-pair loss {loss.item():.3f}, differences vary by {term.item():.4f}")


# %% Mixins, on a LightningModule of one's own. It needs no training step: the terms are the loss.
class Encoder(LightningModule):
    """Map images to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings, shape (B, 32)."""
        return self.network(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam. The proxies of a loss are added to it."""
        return torch.optim.Adam(self.network.parameters(), lr=1e-3)


class Learner(DifferenceAlignmentMixin, ContrastiveMixin, Encoder):
    """The same, trained by a loss on its embeddings, with aligned differences."""


def embed(weight: float) -> Tensor:
    """Train with this weight of the alignment, and return the embeddings of all images."""
    torch.manual_seed(0)
    model = Learner(contrastive_criterion=MetricLearningLoss("NPairsLoss"), alignment_weight=weight)
    loader = DataLoader(TensorDataset(images[seen], labels[seen]), batch_size=40, shuffle=True, drop_last=True)
    trainer = Trainer(
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, loader)
    return model(images).detach()


aligned = embed(1.0)
for name, embeddings in (("without alignment", embed(0.0)), ("with alignment", aligned)):
    figures = EmbeddingMetrics(recall_at=(1, 4))(embeddings[~seen], labels[~seen])
    text = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    print(f"mixin:    digits 5 to 9, never seen, {name}: {text}")

# %% What else is in an embedding: how well a linear classifier reads the unseen digits from it.
print(f"probe:    accuracy on the digits 5 to 9 by cross-validation {LinearProbe()(aligned[~seen], labels[~seen]):.3f}")

# %% YAML: the same without a line of Python.
config = Path(__file__).resolve().parents[1] / "configs" / "metric_learning.yaml"
epochs = f"--trainer.max_epochs={options.epochs}"
every = f"--trainer.check_val_every_n_epoch={options.epochs}"
quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.callbacks=null"]
run = main(["fit", f"--config={config}", epochs, every, *quiet, f"--trainer.logger.init_args.save_dir={options.out}"])
print(f"YAML:     recall@1 of the digits 5 to 9 {run.trainer.callback_metrics['val_recall@1']:.3f}")
