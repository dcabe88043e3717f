"""Measurements that two processes share, and what has to be the same however many there are."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_netsim._checks import NetsimError
from lightning_netsim.data.processes import Processes
from lightning_netsim.data.sources import from_loader
from lightning_netsim.measurement.measure import measure_similarity
from lightning_netsim.measurement.result import SimilarityResult
from lightning_netsim.measurement.settings import SweepSettings
from tests.measuring import classifier, loader, whole

PLANS = ("store", "sketch", "reiterate")
SIZE, OTHERS, FEW = 150, 90, 10


def inputs(number: int, seed: int) -> Tensor:
    made = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    made[number // 2] = torch.nan  # Left out.
    return made


def measured(plan: str, apart: bool, processes: Processes | None = None, size: int = SIZE) -> SimilarityResult:
    """Measure with counts of every kind, from sketches in several lots where the plan makes any."""
    budget = None if plan != "reiterate" else 230_000.0 if processes is None else 170_000.0
    settings = SweepSettings(
        k=5,
        directions="all",
        plan=plan,
        projection_dim=60,
        thresholds=(0.5,),
        powers=(2.0,),
        memory_budget=budget,
        chunk_size=16,
    )
    queries = from_loader(loader(inputs(size, 1), torch.arange(size) % 3), whole)
    reference = from_loader(loader(inputs(OTHERS, 2)), whole) if apart else None
    return measure_similarity(classifier(), queries, reference, settings, processes=processes)


def disagreement(rank: int, processes: Processes) -> list[str]:
    """Return what is said of two sets that are not the same."""
    said = []
    for number, labels in ((SIZE + rank, torch.zeros(SIZE + rank)), (SIZE, torch.full((SIZE,), rank))):
        source = from_loader(loader(inputs(number, 1), labels.long()), whole)
        try:
            measure_similarity(classifier(), source, settings=SweepSettings(k=2), processes=processes)
        except NetsimError as error:
            said.append(str(error))
    return said


def values(result: SimilarityResult) -> dict[str, Any]:
    """Return what has to be the same however many processes there are."""
    activations = result.activation_neighbors
    return {
        "soft": result.counts.soft,
        "hard": result.counts.hard,
        "power": result.counts.power,
        "num_reference": result.counts.num_reference,
        "index": result.neighbors.index,
        "similarity": result.neighbors.similarity,
        "recall": result.neighbors.recall,
        "activations": None if activations is None else activations.similarity,
        "positions": result.queries.index,
        "labels": result.queries.labels,
        "predictions": result.predictions,
        "norm": result.norm,
        "num_left_out": result.num_left_out,
        "num_sweeps": result.plan["num_sweeps"],
    }


def shared(processes: Processes) -> dict[str, Any]:
    """Return what one of several processes finds; of few samples there is one batch, and the second has nothing to do."""
    found = {
        (plan, apart, size): values(measured(plan, apart, processes, size))
        for plan in PLANS
        for apart in (False, True)
        for size in (SIZE, FEW)
    }
    return {"found": found, "said": disagreement(processes.rank, processes)}


def together(path: Path, function: Callable[[Processes], Any]) -> list[Any]:
    """Return what a function returns in each of two processes, which are copies of this one.

    Args:
        path: an empty directory, where they meet.
        function: called with the processes.
    """
    if not dist.is_available() or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs torch.distributed and a system that forks")
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_run, args=(path, rank, function)) for rank in (0, 1)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=240)
    assert [process.exitcode for process in running] == [0, 0]
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _run(path: Path, rank: int, function: Callable[[Processes], Any]) -> None:
    # The threads of the copied process are gone: what waits for them would wait for ever.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)
    torch.save(function(Processes.current()), path / f"{rank}.pt")
    dist.destroy_process_group()
