"""Compare distributions: of samples, of the features of two domains, of the patches of two images.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits and two
photographs.
"""

# %% Data: 8×8 scans of digits, the same before cloudy backgrounds, and a photograph.
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits, load_sample_image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import gaussian_blur

from lightning_netsim import MMDMixin
from lightning_netsim.cli import main
from lightning_netsim.demos import ImageClassifier
from lightning_netsim.estimators import SlicedWassersteinDistance
from lightning_netsim.functional import squared_mmd
from lightning_netsim.losses import MMDLoss, PatchMMDLoss, RandomNetworkLoss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=1797, help="how many digits to take")
parser.add_argument("--epochs", type=int, default=15, help="epochs of training")
parser.add_argument("--out", default="runs/distributions_example", help="where the run from YAML goes")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[: options.samples], dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target[: options.samples])
clouds = F.interpolate(torch.rand(len(images), 1, 3, 3), (8, 8), mode="bilinear")
clouded = images + 0.6 * clouds * (1 - images)

# %% A function: the squared maximum mean discrepancy of two sets of vectors.
half = len(images) // 2
one, other = images[:half].flatten(1), images[half:].flatten(1)
print(f"function: two halves of the digits, unbiased {squared_mmd(one, other, unbiased=True):.4f}")

# %% A module: the same with bandwidths from the data, in a plain training step or to report.
distance = MMDLoss(unbiased=True)
print(f"module:   two halves of the digits {distance(one, other):.4f}")
print(f"module:   digits and clouded digits {distance(one, clouded[half:].flatten(1)):.4f}")


# %% A mixin: labels of one domain, none of the other; the features of both are to be distributed alike.
class Adapted(MMDMixin, ImageClassifier):
    """A classifier whose hidden layer is not to know where an image comes from."""


def accuracy(weight: float) -> float:
    """Train on the labels of plain digits and return the accuracy on clouded ones."""
    torch.manual_seed(0)
    model = Adapted(network="digits", mmd_layer="network.5", mmd_weight=weight)
    source = DataLoader(TensorDataset(images[:half], labels[:half]), batch_size=64, shuffle=True)
    target = DataLoader(TensorDataset(clouded[:half]), batch_size=64, shuffle=True)
    trainer = Trainer(
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, {"source": source, "target": target})
    return float((model.eval()(clouded[half:]).argmax(1) == labels[half:]).float().mean())


for weight in (0.0, 1.0):
    print(f"mixin:    clouded digits, weight {weight:g}: accuracy {accuracy(weight):.3f}")

# %% Patches: a photograph moved by three pixels looks the same, a blurred one does not. Pixels see it the other way round.
photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None, :, 150:282, 200:336].float() / 255
original = photograph[:, :, 2:130, 2:130]
changed = {"moved": photograph[:, :, 2:130, 5:133], "blurred": gaussian_blur(original, [5, 5], [1.0, 1.0])}
distances = {
    "pixels, mean square": F.mse_loss,
    "PatchMMDLoss": PatchMMDLoss().eval(),
    "PatchMMDLoss, MMD++": PatchMMDLoss(remove_mean=True, local_weight=0.025).eval(),
    "RandomNetworkLoss": RandomNetworkLoss().eval(),
}
for name, distance in distances.items():
    moved, blurred = (float(distance(image, original)) for image in changed.values())
    nearer = "moved" if moved < blurred else "blurred"
    print(f"patches:  {name:20} moved {moved:.5f}, blurred {blurred:.5f}: the nearer is {nearer}")

# %% A metric: the sliced Wasserstein distance of patches, scale by scale.
for name, image in changed.items():
    metric = SlicedWassersteinDistance()
    metric.update(original, real=True)
    metric.update(image, real=False)
    print(f"metric:   {name:8}", ", ".join(f"{key} {value:.3f}" for key, value in metric.compute().items()))

# %% YAML: a network that enlarges photographs, trained by a patch loss.
config = Path(__file__).resolve().parents[1] / "configs" / "super_resolution.yaml"
short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=5"]
quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
run = main(["fit", f"--config={config}", *short, *quiet, f"--trainer.logger.init_args.save_dir={options.out}"])
print(f"YAML:     after five steps, PSNR of the held-out photograph {run.trainer.callback_metrics['val_psnr']:.1f}")
