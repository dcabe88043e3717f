"""Clean a data set: train on labels of which some are wrong, find them by their kernel neighbors, review, and train again.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits; with
`--data-dir DIRECTORY`, torchvision's folder that holds `MNIST/raw`, it cleans images of MNIST instead.
"""

# %% Data: scans of digits. Two fifths of the training labels are replaced by wrong ones, and three images come twice.
from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import MNIST

from lightning_netsim import analyze, apply_review
from lightning_netsim.analysis import review
from lightning_netsim.demos import DigitsNetwork, MNISTNetwork

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=1200, help="how many images to train on")
parser.add_argument("--epochs", type=int, default=30, help="epochs of training")
parser.add_argument("--data-dir", help="torchvision's folder with MNIST/raw; without it, scikit-learn's digits")
parser.add_argument("--out", default="runs/clean_data", help="where tables and figures go")
options = parser.parse_args()
out = Path(options.out)

if options.data_dir is None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    truth = torch.tensor(digits.target)
    network_class: type[nn.Module] = DigitsNetwork
else:
    mnist = MNIST(options.data_dir)
    images, truth, network_class = mnist.data[:7000].unsqueeze(1) / 255, mnist.targets[:7000], MNISTNetwork

generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(images), generator=generator)
images, truth = images[order], truth[order]
train_images, test_images = images[: options.samples].clone(), images[options.samples :]
train_truth, test_truth = truth[: options.samples].clone(), truth[options.samples :]
train_images[-3:], train_truth[-3:] = train_images[:3], train_truth[:3]
wrong = torch.rand(options.samples, generator=generator) < 0.4
labels = torch.where(wrong, (train_truth + torch.randint(1, 10, wrong.shape, generator=generator)) % 10, train_truth)
noisy = TensorDataset(train_images, labels)


# %% A network, trained in the plainest way.
@torch.enable_grad()
def train(data: Dataset[tuple[Tensor, Tensor]], seed: int = 0) -> nn.Module:
    """Return a network that was trained on a data set."""
    torch.manual_seed(seed)
    network = network_class()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(options.epochs):
        for inputs, targets in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    return network


@torch.no_grad()
def accuracy(data: Dataset[tuple[Tensor, Tensor]]) -> float:
    """Return the share of test images that networks trained on a data set tell right, the mean of three."""
    predicted = torch.stack([train(data, seed)(test_images).argmax(1) for seed in range(1, 4)])
    return float((predicted == test_truth).float().mean())


before = train(noisy)

# %% What it makes of its own training set: thirty neighbors of each image, and what is wrong with them.
analysis = analyze(before, DataLoader(noisy, batch_size=128), k=min(30, options.samples - 1), progress=False)
issues = analysis.find_issues()
print(issues)
found = torch.tensor(issues.found("label")["index"].to_numpy(copy=True))
right = int((~wrong[found]).sum())
print(f"\n{len(found)} labels are suspect: {len(found) - right} of the {int(wrong.sum())} wrong ones, {right} others.")
out.mkdir(parents=True, exist_ok=True)
issues.plot().savefig(out / "issues.png")

# %% The loop: a table to look through and edit, and the data set that it decides on. Here nobody edits it.
analysis.save(out / "record")
table = review(out / "record", overwrite=True)
reviewed = apply_review(noisy, table)
print(reviewed)

# %% Train again, on what is left, for as many epochs.
clean = TensorDataset(train_images, train_truth)
gain = pd.Series({"labels as given": accuracy(noisy), "after review": accuracy(reviewed), "true labels": accuracy(clean)})
print("\nMean accuracy on test images:\n" + gain.map("{:.3f}".format).to_string())
