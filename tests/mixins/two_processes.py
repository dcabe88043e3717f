"""Run with a directory as argument: train a regularized module on two processes for one step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.mixins.modules import Regularized, loader, trainer


class Noting(Regularized):
    """Remember what the step was called with."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = [part.clone() for part in batch]
        return super().training_step(batch, batch_idx)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    module = Noting(similarity_weight=0.5)
    fitting = trainer(devices=2, strategy="ddp", default_root_dir=root)
    fitting.fit(module, loader(size=12, batch_size=6))
    term = fitting.callback_metrics["netsim/similarity_loss"]
    torch.save({"state": module.state_dict(), "term": term, "batch": module.seen}, root / f"rank-{fitting.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
