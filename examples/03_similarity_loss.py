"""Tell a network which inputs are to be the same to it: one criterion, by each way in.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits.
"""

# %% Data and a network: 8×8 scans of digits.
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import JacobianOperator, SimilarityMixin, pairwise_similarity, per_sample_jacobian
from lightning_netsim.cli import main
from lightning_netsim.functional import group_similarity_loss
from lightning_netsim.losses import GradientBatch, GroupSimilarityLoss, InvarianceLoss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=1024, help="how many images to train on")
parser.add_argument("--epochs", type=int, default=3, help="epochs of training")
parser.add_argument("--out", default="runs/similarity_example", help="where the run from YAML goes")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images[: options.samples], dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target[: options.samples])
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

# %% A function: of similarities, however they were computed. Exact and simple, in memory for every gradient.
few, kinds = images[:32], labels[:32]
gradients = per_sample_jacobian(network, few, directions=1, create_graph=True).materialize()
loss = group_similarity_loss(pairwise_similarity(gradients), kinds)
print(f"function: mean similarity of digits of one class {-loss.item():.4f}")

# %% A module, in a plain training step: the same number, from gradients that are never formed.
operator = JacobianOperator(network, directions=1, create_graph=True)
batch = GradientBatch(operator, few, kinds)
similarity = GroupSimilarityLoss()(batch)
print(f"module:   mean similarity of digits of one class {-similarity.item():.4f}")
(F.cross_entropy(batch.outputs, kinds) + 0.1 * similarity).backward()  # The forward pass is shared.


# %% A mixin, on a LightningModule of one's own: here, noise shall make no difference to how a digit is computed.
class Digits(LightningModule):
    """A classifier that knows nothing of similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class SimilarDigits(SimilarityMixin, Digits):
    """The same, with a term added to its loss."""


def noisy(digit: Tensor) -> Tensor:
    """Return a digit with noise."""
    return digit + 0.2 * torch.randn_like(digit)


trainer = Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
trainer.fit(SimilarDigits(criterion=InvarianceLoss(noisy), similarity_weight=[(0, 0.0), (50, 0.5)]), loader)
print(f"mixin:    similarity of a digit and its noisy twin {-trainer.callback_metrics['netsim/similarity_loss'].item():.4f}")

# %% YAML: the same mixin on a module of the package, from a file.
config = Path(__file__).resolve().parents[1] / "configs" / "similarity_loss.yaml"
quiet = ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
where = [f"--trainer.logger.save_dir={options.out}", f"--trainer.max_epochs={options.epochs}"]
run = main(["fit", f"--config={config}", *where, *quiet])
print(f"YAML:     mean similarity of digits of one class {-run.trainer.callback_metrics['netsim/similarity_loss'].item():.4f}")
