"""Small models, data sets and trainers for the monitor's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_netsim import SimilarityMonitor

CLASSES = 3
SAMPLES = 22


class Points(Dataset[Any]):
    """Class-dependent points; `noise` draws from every global generator, as an augmentation would."""

    def __init__(self, size: int = SAMPLES, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.arange(size) % CLASSES
        self.points = torch.randn(size, 1, 6, 6, generator=generator) + self.labels[:, None, None, None]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = self.points[index]
        if self.noise:
            point = point + 0.1 * torch.randn_like(point) + 0.1 * float(np.random.rand())  # noqa: NPY002
        return point, self.labels[index]


class Stream(IterableDataset[Any]):
    """The same points without an index or a length."""

    def __init__(self) -> None:
        self.points = Points()

    def __iter__(self) -> Any:
        return iter([self.points[i] for i in range(len(self.points))])


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Any:
        points = Points()
        return iter([(points.points[i : i + 8], points.labels[i : i + 8]) for i in range(0, SAMPLES, 8)])


class Data(LightningDataModule):
    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Points(noise=True), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        if self.kind == "stream":
            return DataLoader(Stream(), batch_size=8)
        if self.kind == "two":
            return [DataLoader(Points(12), batch_size=5), DataLoader(Points(10), batch_size=5)]
        if self.kind == "batches":
            return Batches()
        return DataLoader(Points(noise="noise" in self.kind), batch_size=8, shuffle="shuffled" in self.kind)

    test_dataloader = val_dataloader


class Network(LightningModule):
    """Convolution, batch norm, dropout, a counter, a cached mask, metrics, logging in forward: all that may be disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, CLASSES))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.calls.append(len(x))
        outputs = self.head(self.features(x))
        self.last = outputs.detach()
        if not self.training:
            self.log("forward_mean", outputs.mean())
            self.accuracy.update(outputs, torch.zeros(len(x), dtype=torch.long, device=outputs.device))
        return outputs

    def _loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self._loss(batch))
        self.log("val_acc", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Witness(Callback):
    """Write down everything that the monitor must not change, as validation ends and as each training batch begins."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        self.seen.append(
            {
                "state": {name: value.clone() for name, value in module.state_dict().items()},
                "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
                "requires_grad": [p.requires_grad for p in module.parameters()],
                "modes": [m.training for m in module.modules()],
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
                "calls": list(getattr(module, "calls", [])),
                "last": getattr(module, "last", None),
                "metric": [torch.as_tensor(v) for v in module.accuracy.metric_state.values()],
                "logged": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("netsim/")},
                "attributes": sorted(vars(module)),
            }
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._note(trainer, pl_module)

    on_test_end = on_validation_end


def fit(
    path: Path, monitor: SimilarityMonitor | None, kind: str = "plain", callbacks: Any = (), **options: Any
) -> tuple[Trainer, Network, Witness]:
    """Train `Network` for two epochs with everything seeded."""
    seed_everything(3)
    witness, network = Witness(), Network()
    chosen = [*callbacks, *([monitor] if monitor else []), witness]
    trainer = quiet_trainer(path, chosen, **{"max_epochs": 2, **options})
    trainer.fit(network, Data(kind))
    return trainer, network, witness


def quiet_trainer(path: Path, callbacks: Any, **options: Any) -> Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, callbacks=callbacks, accelerator="cpu", **{**defaults, **options})
