"""Batches are kept as they went by, or read again as they would have been."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_netsim._checks import NetsimError
from lightning_netsim.callbacks.collector import Collector, WeightSnapshot
from tests.callbacks.runs import Batches, Points, Stream
from tests.callbacks.small import points

INF = float("inf")


def fake_trainer(world_size: int = 1) -> Any:
    """Return what a collector asks of a trainer: move batches, and mark them as moved by adding 100 to the labels."""
    return SimpleNamespace(
        world_size=world_size,
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
        lightning_module=SimpleNamespace(_on_before_batch_transfer=lambda batch, dataloader_idx: batch),
        strategy=SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: [batch[0], batch[1] + 100]),
    )


def collect(loaders: list[Any], num_batches: list[float], world_size: int = 1, **options: Any) -> Collector:
    """Return a collector that has seen the epoch."""
    options = {"max_samples": None, "budget": 1e9, "seed": 0, **options}
    collector = Collector(fake_trainer(world_size), loaders, num_batches, **options)
    for number, (loader, limit) in enumerate(zip(loaders, num_batches, strict=True)):
        for batch_idx, batch in enumerate(loader):
            if batch_idx < limit:
                collector.add(batch, batch_idx, number)
    return collector


def samples(collector: Collector) -> tuple[list[int], list[int], list[int], Tensor]:
    """Return positions, labels, loaders and inputs of all samples, after making sure that they come twice."""
    source = collector.source(SimpleNamespace(device=torch.device("cpu")))
    chunks = list(source)
    index = torch.cat([chunk.index for chunk in chunks])
    assert torch.equal(index, torch.cat([chunk.index for chunk in source]))
    assert source.num_samples in (None, len(index))
    if source.positions is not None:
        assert torch.equal(source.positions, index)
    loaders = [chunk.dataloader for chunk in chunks for _ in chunk.index]
    labels = torch.cat([chunk.batch[1] for chunk in chunks])
    return index.tolist(), labels.tolist(), loaders, torch.cat([chunk.batch[0] for chunk in chunks])


def test_kept_batches_are_copies_of_what_the_step_saw() -> None:
    collector = Collector(fake_trainer(), [points()], [3], None, 1e9, 0)
    for batch_idx, (x, y) in enumerate(points()):
        collector.add([x, y], batch_idx, 0)
        x.zero_()
    index, labels, _, inputs = samples(collector)
    assert index == list(range(22))
    assert labels == Points().labels.tolist()  # below 100: not read again
    assert torch.equal(inputs, Points().points)


@pytest.mark.parametrize("reason", ["shuffled", "budget", "processes"])
def test_the_data_set_is_read_again_in_order_where_batches_are_not_kept(reason: str) -> None:
    loader = points(shuffle=reason == "shuffled")
    budget = 2000.0 if reason == "budget" else 1e9
    index, labels, _, inputs = samples(collect([loader], [3], 2 if reason == "processes" else 1, budget=budget))
    assert index == list(range(22))
    assert labels == (Points().labels + 100).tolist()
    assert torch.equal(inputs, Points().points)


@pytest.mark.parametrize("limit", [2, 3])
def test_a_subset_is_the_same_kept_or_read_again(limit: int) -> None:
    kept = samples(collect([points()], [limit], max_samples=6))
    read = samples(collect([points(shuffle=True)], [limit], max_samples=6))
    assert kept[0] == read[0]
    assert len(set(kept[0])) == 6
    assert kept[0] != list(range(6))
    assert max(kept[0]) < (16 if limit == 2 else 22)
    assert torch.equal(kept[3], read[3])
    assert samples(collect([points()], [limit], max_samples=6, seed=1))[0] != kept[0]


@pytest.mark.parametrize("options", [{}, {"budget": 3000.0}, {"max_samples": 5}])
def test_positions_go_on_from_one_loader_to_the_next(options: dict[str, Any]) -> None:
    index, labels, loaders, _ = samples(collect([points(12), points(10)], [2, 2], **options))
    size = options.get("max_samples")
    assert len(index) == (22 if size is None else 2 * size)
    assert len(set(index)) == len(index)
    assert loaders == [0 if position < 12 else 1 for position in index]
    assert [label % 100 for label in labels] == [(position if position < 12 else position - 12) % 3 for position in index]


def test_a_batch_is_the_last_when_none_follows() -> None:
    collector = Collector(fake_trainer(), [points(), points(), points()], [3, 2, 0], None, 1e9, 0)
    assert collector.length_is_known
    last = [(b, n) for n, size in enumerate([3, 2]) for b in range(size) if collector.is_last(b, n)]
    assert last == [(1, 1)]


def test_the_last_batch_of_a_stream_is_not_known() -> None:
    collector = Collector(fake_trainer(), [DataLoader(Stream(), batch_size=8)], [INF], None, 1e9, 0)
    assert not collector.length_is_known
    assert not any(collector.is_last(batch_idx, 0) for batch_idx in range(4))


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=8), Batches()])
def test_a_stream_is_kept_and_numbered_as_it_comes(loader: Any) -> None:
    index, labels, _, _ = samples(collect([loader], [INF]))
    assert index == list(range(22))
    assert labels == Points().labels.tolist()
    assert samples(collect([loader], [INF], max_samples=10))[0] == list(range(10))


def test_a_stream_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NetsimError, match="`memory_budget`"):
        collect([DataLoader(Stream(), batch_size=8)], [INF], budget=2000.0)


def test_a_loader_of_whole_batches_is_numbered_by_sample() -> None:
    whole = [(Points().points[i : i + 8], Points().labels[i : i + 8]) for i in (0, 8, 16)]
    index, labels, _, _ = samples(collect([DataLoader(whole, batch_size=None)], [3]))
    assert index == list(range(22))
    assert labels == Points().labels.tolist()


def test_batches_that_can_be_gone_through_only_once_are_kept() -> None:
    spent = (batch for batch in points())
    collector = Collector(fake_trainer(), [spent], [INF], None, 1e9, 0)
    for batch_idx, batch in enumerate(spent):
        collector.add(batch, batch_idx, 0)
    assert collector.num_samples is None
    assert samples(collector)[0] == list(range(22))


def test_the_number_of_samples_is_that_of_all_processes() -> None:
    def number(loader: Any, num_batches: float, max_samples: int | None = None) -> int | None:
        return Collector(fake_trainer(), [loader], [num_batches], max_samples, 1e9, 0).num_samples

    assert number(points(), 3) == 22
    assert number(points(), 2) == 16
    assert number(points(), INF, 5) == 5
    assert number(DataLoader(Stream(), batch_size=8), INF, 5) is None
    shared = DataLoader(Points(11), batch_size=2, sampler=DistributedSampler(Points(11), 2, 0, shuffle=False))
    assert number(shared, 3) == 11
    assert number(shared, 2) == 8


def test_a_snapshot_puts_weights_in_place_and_takes_them_out_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.ones(2, 2)
    parameter, before = model[0].weight, model[0].weight.detach().clone()
    snapshot = WeightSnapshot(model)
    with torch.no_grad():
        parameter.add_(1)
        model[1].running_mean.add_(1)
    try:
        with snapshot.in_place():
            assert torch.equal(model[0].weight, before)
            assert torch.equal(model[1].running_mean, torch.zeros(2))
            raise KeyError
    except KeyError:
        pass
    assert model[0].weight is parameter
    assert torch.equal(parameter, before + 1)
    assert torch.equal(parameter.grad, torch.ones(2, 2))
    assert torch.equal(model[1].running_mean, torch.ones(2))
