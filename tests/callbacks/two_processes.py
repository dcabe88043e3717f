"""Run with a directory as argument: train on two processes, then validate on the first batches only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from tests.callbacks.small import Small, points, watching

SIZE, BATCH = 11, 2


class Report(Callback):
    """Write down what each process logged, and which samples it saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: list[int] = []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.labels += batch[1].tolist()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            seen = {"metrics": values, "count": len(self.labels), "world": trainer.world_size}
            (self.path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))
        self.labels = []


def trainer(path: Path, **options) -> Trainer:
    path.mkdir(parents=True, exist_ok=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    callbacks = [watching(max_overhead=1e9), Report(path)]
    return Trainer(default_root_dir=path, callbacks=callbacks, **two, **quiet, **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    seed_everything(1)
    module = Small()
    fitting = trainer(root / "fit", max_epochs=2, limit_train_batches=1)
    fitting.fit(module, points(8, batch_size=2, shuffle=True), points(SIZE, batch_size=BATCH))
    if fitting.is_global_zero:
        torch.save(module.state_dict(), root / "weights.pt")
    limited = trainer(root / "limited", limit_val_batches=2)
    limited.validate(module, points(SIZE, batch_size=BATCH), verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
