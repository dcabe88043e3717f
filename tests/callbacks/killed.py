"""Run with a directory and a number as arguments: train, and be killed while the tables are written for the n-th time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Trainer, seed_everything

from tests.callbacks.small import Small, points, watching


def main(root: Path, number: int) -> None:
    torch.set_num_threads(1)
    seed_everything(1)
    write, written = pd.DataFrame.to_parquet, 0

    def write_until_killed(self: pd.DataFrame, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        if written == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *args, **kwargs)

    pd.DataFrame.to_parquet = write_until_killed  # type: ignore[method-assign]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=root, accelerator="cpu", max_epochs=3, callbacks=[watching()], **quiet)
    trainer.fit(Small(), points(8, batch_size=4), points(11, batch_size=4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
