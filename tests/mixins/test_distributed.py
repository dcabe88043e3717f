"""Two processes average the terms of their own batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_netsim.mixins.layers import gathered
from tests.mixins import two_processes
from tests.mixins.modules import Regularized, batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory in which two processes left what they trained."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    root = tmp_path_factory.mktemp("two_processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(two_processes.__file__)), str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def assert_same_state(state: dict[str, torch.Tensor], module: torch.nn.Module) -> None:
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_the_mean_of_the_terms_of_both_processes_is_trained_on(found: Path) -> None:
    ranks = [torch.load(found / f"rank-{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["term"] != ranks[1]["term"]
    module = Regularized(similarity_weight=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for rank in ranks:
        module.training_step(rank["batch"], 0).div(2).backward()
    optimizer.step()
    for rank in ranks:
        assert_same_state(rank["state"], module)


def test_embeddings_of_both_processes_train_as_one_batch_would(found: Path) -> None:
    module = two_processes.encoder()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.training_step(batch(12), 0).backward()
    optimizer.step()
    assert not torch.equal(
        module.contrastive_criterion.loss.proxies, two_processes.encoder().contrastive_criterion.loss.proxies
    )
    for rank in (0, 1):
        assert_same_state(torch.load(found / f"joint-{rank}.pt"), module)


def test_rows_of_all_processes_are_joined_without_their_padding() -> None:
    parts = [torch.randn(3, 2), torch.randn(5, 2)]

    class Gathering:
        def all_gather(self, value: torch.Tensor, sync_grads: bool = False) -> torch.Tensor:
            if value.ndim == 0:
                return torch.tensor([3, 5])
            return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, 5 - len(part))) for part in parts])

    assert torch.equal(gathered(Gathering(), parts[0]), torch.cat(parts))  # type: ignore[arg-type]
