"""Run with a directory as argument: train regularized modules on two processes for one step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_netsim.losses import MetricLearningLoss
from tests.mixins.modules import Regularized, TrainedEncoder, batch, loader, trainer

#: Of the encoder whose samples are compared with those of the other process.
CRITERION = {"loss": "ProxyAnchorLoss", "loss_args": {"num_classes": 3, "embedding_size": 3}}


class Noting(Regularized):
    """Remember what the step was called with."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = [part.clone() for part in batch]
        return super().training_step(batch, batch_idx)


def encoder() -> TrainedEncoder:
    torch.manual_seed(3)  # Of the proxies.
    return TrainedEncoder(contrastive_criterion=MetricLearningLoss(**CRITERION))


class Uneven(Sampler[int]):
    """Give the first process 5 samples and the second 7."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5) if torch.distributed.get_rank() == 0 else range(5, 12))

    def __len__(self) -> int:
        return 5 if torch.distributed.get_rank() == 0 else 7


def fit(module: Any, root: Path, data: Any, **options: Any) -> Any:
    fitting = trainer(**{"devices": 2, "strategy": "ddp", "default_root_dir": root, "max_steps": 1, **options})
    fitting.fit(module, data)
    return fitting


def main(root: Path) -> None:
    module = Noting(similarity_weight=0.5)
    fitting = fit(module, root, loader(size=12, batch_size=6))
    term = fitting.callback_metrics["netsim/similarity_loss"]
    torch.save({"state": module.state_dict(), "term": term, "batch": module.seen}, root / f"rank-{fitting.global_rank}.pt")

    joint = encoder()
    uneven = DataLoader(TensorDataset(*batch(12)), batch_size=7, sampler=Uneven())
    fit(joint, root, uneven, use_distributed_sampler=False)
    torch.save(joint.state_dict(), root / f"joint-{fitting.global_rank}.pt")

    for options in ({"contrastive_every_n_steps": 2}, {"contrastive_labels": 3}):  # Steps without the proxies.
        criterion = MetricLearningLoss(**CRITERION)
        fit(TrainedEncoder(contrastive_criterion=criterion, **options), root, loader(size=24), max_epochs=2, max_steps=-1)


def work(rank: int, root: Path, port: int) -> None:
    """Be one of two processes that a launcher has started: Lightning then starts none."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="two_processes")
    main(root)


if __name__ == "__main__":
    assert "faiss" not in sys.modules, "it is imported on first use"
    # Forked, so that what is slow to import is imported once.
    arguments = (Path(sys.argv[1]), find_free_network_port())
    torch.multiprocessing.start_processes(work, args=arguments, nprocs=2, start_method="fork")
