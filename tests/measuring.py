"""What the tests of measurements share: small sources and models, and the oracle's table of similarities."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_netsim.data import trees
from lightning_netsim.data.sources import SampleSource, from_batches
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from tests import cases, oracles


@cache
def oracle(name: str) -> Tensor:
    return oracles.dense_similarity(jacobian(name), 1e-6)


def jacobian(name: str) -> Tensor:
    model, inputs = cases.build(name)
    found = oracles.loop_jacobian(model, inputs)
    if name not in cases.LARGE:
        return found
    # The oracle's kernel loops over entries; a rotation of the parameters to as many as there are rows changes no product.
    flat = found.flatten(0, 1)
    return torch.linalg.qr(flat.mT).R.mT.reshape(*found.shape[:2], -1)


def source(inputs: Any, size: int = 2) -> SampleSource:
    count = trees.batch_size(inputs) or 1
    return from_batches([trees.take(inputs, slice(start, start + size), count) for start in range(0, count, size)])


def measure(name: str, size: int = 2, **settings: Any) -> SimilarityResult:
    model, inputs = cases.build(name)
    settings = {"k": 2, "directions": "all", "compare_activations": False, **settings}
    return measure_similarity(model, source(inputs, size), settings=SweepSettings(**settings))


def check_counts(found: Tensor, wanted: Tensor) -> None:
    allowed = 1e-4 * wanted.abs().clamp_min(1)
    assert bool(((found.double() - wanted).abs() <= allowed).all()), (found, wanted)


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def loader(inputs: Tensor, labels: Tensor | None = None, size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, torch.zeros(len(inputs)).long() if labels is None else labels), size)


def whole(batch: Any, batch_idx: int) -> Any:
    return batch


class Dead(nn.Module):
    """Without a gradient where the input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.relu(x))))
