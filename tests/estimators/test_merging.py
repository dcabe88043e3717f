"""Metrics of two halves of the samples, put together as torchmetrics does it, find what one finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_netsim.estimators import EmbeddingMetrics, LinearProbe, SlicedWassersteinDistance


def labeled(size: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(size) % 3
    return torch.eye(8)[labels] + 0.7 * torch.randn(size, 8), labels


def images(size: int) -> Tensor:
    return torch.rand(size, 3, 7, 7)


#: A metric, what its two sets are called, and how to draw some samples of one.
METRICS: dict[str, tuple[Any, str, Any]] = {
    "embeddings": (lambda: EmbeddingMetrics(nmi=False), "reference", labeled),
    "probe": (LinearProbe, "reference", labeled),
    "images": (lambda: SlicedWassersteinDistance(patches_per_image=9, num_directions=64), "real", lambda n: (images(n),)),
}


def halves(name: str) -> tuple[list[Metric], Any]:
    """Return metrics that saw half of each set, in batches of different sizes and numbers, and what is found by all."""
    make, key, draw = METRICS[name]
    metrics, whole = [make(), make()], make()
    for chosen in (False, True):
        for metric, sizes in zip(metrics, ((9, 6), (26,)), strict=True):
            for size in sizes:
                batch = draw(size)
                metric.update(*batch, **{key: chosen})
                whole.update(*batch, **{key: chosen})
    return metrics, whole.compute()


def near(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_merged_states_are_those_of_one_metric(name: str) -> None:
    (first, second), wanted = halves(name)
    first.merge_state(second)
    near(first.compute(), wanted)
    fresh = METRICS[name][0]()
    fresh.merge_state(first)  # One that has seen nothing itself.
    near(fresh.compute(), wanted)


@pytest.mark.parametrize("name", METRICS)
def test_each_of_two_processes_finds_what_one_finds(name: str) -> None:
    """As torchmetrics asks each for the states of both, one after the other."""
    metrics, wanted = halves(name)
    states = {key: [getattr(metric, key) for metric in metrics] for key in metrics[0]._reductions}
    keys, held = iter(states), {key: len(state[0]) for key, state in states.items()}

    def gather(mine: Tensor, group: Any) -> list[Tensor]:
        both = [torch.cat(state) if isinstance(state, list) else state for state in states[next(keys)]]
        assert torch.equal(both[0], mine)
        return both

    metrics[0].dist_sync_fn, metrics[0].distributed_available_fn = gather, lambda: True
    near(metrics[0].compute(), wanted)
    assert not list(keys)
    assert {key: len(getattr(metrics[0], key)) for key in states} == held, "each keeps its own part only"
