"""A model without noise, whose tables have an exact answer, and the ways to get that answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_netsim import SimilarityMonitor
from lightning_netsim.records.record import Record, list_records, read_record
from tests.callbacks.runs import CLASSES, SAMPLES, Points, quiet_trainer
from tests.oracles import dense_similarity, loop_jacobian


class Small(LightningModule):
    """Two linear layers; `scores` are logged epoch by epoch, to be watched by other callbacks."""

    def __init__(self, scores: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        self.scores = scores
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.scores and not self.trainer.sanity_checking:
            self.log("score", self.scores[self.current_epoch])

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Keyed(Dataset[Any]):
    """The same points as mappings with names."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        point, label = Points()[index]
        return {"x": point, "label": label, "id": f"point-{index}.png"}


def watching(**options: Any) -> SimilarityMonitor:
    """Return a monitor with all outputs as directions, which draws and prints nothing unless asked to."""
    return SimilarityMonitor(**{"k": 3, "directions": "all", "figures": False, "summary": False, **options})


def points(size: int = SAMPLES, **options: Any) -> DataLoader[Any]:
    return DataLoader(Points(size), **{"batch_size": 8, **options})


def train(
    path: Path,
    monitor: SimilarityMonitor,
    val: Any = None,
    module: LightningModule | None = None,
    callbacks: Any = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train one batch an epoch for two epochs, and watch."""
    seed_everything(1)
    module = Small() if module is None else module
    trainer = quiet_trainer(path, [*callbacks, monitor], **{"max_epochs": 2, "limit_train_batches": 1, **options})
    train_loader = DataLoader(Points(16), batch_size=8, shuffle=True)
    trainer.fit(module, train_loader, points() if val is None else val, ckpt_path=ckpt_path, weights_only=bool(ckpt_path))
    return trainer


def records(path: Path) -> list[Record]:
    return [read_record(place) for place in list_records(path)]


def oracle(module: Small, queries: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """Return k(x_i, x'_j), float64: of all points with each other, or of queries with a reference set."""
    queries = Points().points if queries is None else queries
    both = queries if reference is None else torch.cat([queries, reference])
    similarity = dense_similarity(loop_jacobian(module.net.eval(), both))
    return similarity if reference is None else similarity[: len(queries), len(queries) :]


def expected_neighbors(similarity: Tensor, k: int) -> list[list[int]]:
    """Return the k nearest others of each sample of a set compared with itself."""
    others = similarity.clone().fill_diagonal_(-2)
    return others.sort(dim=1, descending=True, stable=True).indices[:, :k].tolist()
