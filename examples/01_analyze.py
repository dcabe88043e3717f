"""Find isolated, crowded and confused samples of any module, without a Trainer.

Run it as a script, or cell by cell in an editor that knows `# %%`. Needs scikit-learn, whose wheel holds the digits.
"""

# %% A small network, trained for a moment on handwritten digits.
from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim import analyze

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=500, help="how many images to compare")
parser.add_argument("--epochs", type=int, default=5, help="passes over the 1,797 images")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
data = TensorDataset(images, labels)

model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(options.epochs):
    for x, y in DataLoader(data, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

# %% Compare samples with each other. In a notebook, the last line of a cell shows tables and pictures.
analysis = analyze(model, DataLoader(data, batch_size=64), k=10, directions="all", max_samples=options.samples)
print(analysis)

# %% The tables are ordinary DataFrames: labels that disagree with all of their nearest neighbors are worth a look.
suspects = analysis.samples.sort_values("same_class_fraction").head(5)
print(suspects[["sample_id", "label", "prediction", "same_class_fraction", "neighbor_fraction"]].to_string(index=False))

# %% Where in the training set do new samples have their neighbors? Query and reference are separate.
new = DataLoader(TensorDataset(images[:20], labels[:20]), batch_size=20)
rest = DataLoader(TensorDataset(images[20:], labels[20:]), batch_size=64)
print(analyze(model, new, reference=rest, k=3, max_samples=options.samples, progress=False).neighbors.head())
