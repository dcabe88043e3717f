"""Sets of samples that can be gone through again: order, subsets, limits, several loaders, and the loader left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_netsim.data.sources import (
    Chunk,
    SampleSource,
    fixed_subset,
    from_batches,
    from_loader,
    is_indexed,
    is_sequential,
    join_sources,
)

VALUES = torch.arange(10.0)


def first(batch: Any, batch_idx: int) -> Tensor:
    return batch[0]


def dataset(size: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(size)), torch.arange(size))


def read(source: SampleSource) -> tuple[list[float], list[int]]:
    chunks = list(source)
    values = torch.cat([chunk.batch if isinstance(chunk.batch, Tensor) else chunk.batch[0] for chunk in chunks])
    return values.tolist(), torch.cat([chunk.index for chunk in chunks]).tolist()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(VALUES)


class Batches:
    """Batches that can be gone through again, of a number that is not known."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([VALUES[:4], VALUES[4:8], VALUES[8:]])


class Unsized(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return VALUES[index]


class ByTwo(BatchSampler):
    """A batch sampler of the user's own."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(10)), 2, False)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 3, 10, 20])
def test_a_loader_is_read_in_the_order_of_its_data_set(size: int, shuffle: bool) -> None:
    source = from_loader(DataLoader(dataset(), size, shuffle=shuffle), first)
    for _ in range(2):
        values, index = read(source)
        assert values == VALUES.tolist()
        assert index == list(range(10))
    assert [len(chunk.index) for chunk in source][:-1] == [size] * (-(-10 // size) - 1)
    assert [chunk.batch_idx for chunk in source] == list(range(-(-10 // size)))
    assert (source.num_samples, source.extent, source.positions) == (10, 10, None)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_fixed_subset(shuffle: bool) -> None:
    loader = DataLoader(dataset(), 3, shuffle=shuffle)
    source = from_loader(loader, first, max_samples=4, seed=5)
    values, index = read(source)
    assert values == [float(i) for i in index] == sorted(values)
    assert len(set(index)) == 4
    assert source.positions is not None
    assert source.positions.tolist() == index
    assert (source.num_samples, source.extent) == (4, 10)
    assert read(from_loader(loader, first, max_samples=4, seed=5))[1] == index
    others = [read(from_loader(loader, first, max_samples=4, seed=seed))[1] for seed in range(6, 12)]
    assert any(other != index for other in others)
    assert [fixed_subset(10, maximum, seed=1) for maximum in (None, 10, 11)] == [None] * 3


def test_limits() -> None:
    loader = DataLoader(dataset(), 3)
    assert read(from_loader(loader, first, limit_batches=2))[1] == [0, 1, 2, 3, 4, 5]
    assert read(from_loader(loader, first, limit_batches=99))[1] == list(range(10))
    source = from_loader(loader, first, max_samples=2, limit_batches=2)
    assert set(read(source)[1]) <= set(range(6))
    assert source.extent == 10
    # A batch sampler of the user's own gives the size; what a loader drops at the end is read too.
    assert [len(chunk.index) for chunk in from_loader(DataLoader(dataset(), batch_sampler=ByTwo()), first)] == [2] * 5
    assert read(from_loader(DataLoader(dataset(), 4, drop_last=True), first))[1] == list(range(10))


def test_transfer_sees_every_batch_and_its_number() -> None:
    seen: list[int] = []

    def transfer(batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch_idx)
        return batch[0] * 2

    assert read(from_loader(DataLoader(dataset(), 4), transfer))[0] == (VALUES * 2).tolist()
    assert seen == [0, 1, 2]


def test_the_loader_and_the_random_state_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(dataset(), 4, shuffle=True, generator=generator)
    before, global_state = generator.get_state(), torch.get_rng_state()
    read(from_loader(loader, first, max_samples=5))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_a_collate_function_is_kept() -> None:
    loader = DataLoader(dataset(), 5, collate_fn=lambda samples: (torch.stack([sample[0] for sample in samples]) + 100,))
    assert read(from_loader(loader, first))[0] == (VALUES + 100).tolist()


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), 4), Batches])
def test_without_an_index_samples_are_numbered_as_they_come(make: Any) -> None:
    source = from_loader(make(), lambda batch, batch_idx: batch)
    for _ in range(2):
        assert read(source) == (VALUES.tolist(), list(range(10)))
    assert source.num_samples is None
    assert read(from_loader(make(), lambda batch, batch_idx: batch, max_samples=6))[1] == [0, 1, 2, 3, 4, 5]
    assert read(from_loader(make(), lambda batch, batch_idx: batch, limit_batches=1))[1] == [0, 1, 2, 3]


def test_batches_without_transfer() -> None:
    batches = [VALUES[:4], VALUES[4:8], VALUES[8:]]
    sizes = [from_batches(batches, **limit).num_samples for limit in ({}, {"max_samples": 6}, {"limit_batches": 1})]
    assert sizes == [10, 6, 4]
    whole = DataLoader(TensorDataset(VALUES.view(5, 2)), batch_size=None)
    assert read(from_loader(whole, first)) == (VALUES.tolist(), list(range(10)))
    assert read(from_batches([(VALUES[:3], "a"), (VALUES[3:], "b")])) == (VALUES.tolist(), list(range(10)))
    chunk = next(iter(from_batches([(VALUES[:3], ["a", "b", "c"])], max_samples=2)))
    assert chunk.batch[1] == ["a", "b"]


def ordered(sampler: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_sampler=BatchSampler(sampler, 4, False))


@pytest.mark.parametrize(
    ("loader", "indexed", "sequential"),
    [
        (DataLoader(dataset(), 4), True, True),
        (DataLoader(dataset(), 4, shuffle=True), True, False),
        (DataLoader(dataset(), batch_sampler=ByTwo()), True, False),
        (ordered(RandomSampler(dataset())), True, False),
        (ordered(SequentialSampler(dataset())), True, True),
        (DataLoader(Unsized(), batch_sampler=[[0, 1], [2]]), False, False),
        (DataLoader(Stream(), 4), False, False),
        (DataLoader(dataset(), batch_size=None), False, False),
        ([VALUES], False, False),
    ],
)
def test_kinds_of_loaders(loader: Any, indexed: bool, sequential: bool) -> None:
    assert (is_indexed(loader), is_sequential(loader)) == (indexed, sequential)


def test_joined_loaders_go_on_counting() -> None:
    sources = [from_loader(DataLoader(dataset(size), 3), first) for size in (4, 5)]
    joined = join_sources(sources)
    assert read(joined)[1] == list(range(9))
    assert [chunk.dataloader for chunk in joined] == [0, 0, 1, 1]
    assert (joined.num_samples, joined.extent) == (9, 9)
    assert join_sources(sources[:1]) is sources[0]
    unknown = join_sources([from_batches(Batches()), sources[0]])
    assert read(unknown)[1] == list(range(14))
    assert unknown.num_samples is None


def test_joined_subsets_keep_their_places() -> None:
    sources = [from_loader(DataLoader(dataset(10), 3), first, max_samples=2, seed=seed) for seed in (1, 2)]
    joined = join_sources(sources)
    index = read(joined)[1]
    assert joined.positions is not None
    assert joined.positions.tolist() == index == [*read(sources[0])[1], *(10 + i for i in read(sources[1])[1])]
    assert joined.extent == 20


def test_processes_share_whole_batches() -> None:
    source = from_loader(DataLoader(dataset(10), 3), lambda batch, batch_idx: (batch[0], batch_idx))
    for size in (1, 2, 3, 6):
        parts = [list(source.split(rank, size)) for rank in range(size)]
        chunks = [chunk for part in parts for chunk in part]
        assert [chunk.index.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert [chunk.batch_idx for chunk in chunks] == [0, 1, 2, 3]
        assert sum(source.split(rank, size).num_samples or 0 for rank in range(size)) == 10
    joined = join_sources([source, from_loader(DataLoader(dataset(4), 2), first)])
    shares = [joined.split(rank, 2) for rank in range(2)]
    assert sorted(index for share in shares for index in read(share)[1]) == list(range(14))
    with pytest.raises(ValueError, match="Expected `loader` to be a DataLoader of a data set with an index"):
        from_batches([VALUES]).split(0, 2)


def test_chunks_split_and_pick() -> None:
    chunk = Chunk({"x": VALUES, "text": list("abcdefghij")}, torch.arange(10) + 50, batch_idx=3, dataloader=1)
    parts = list(chunk.split(4))
    assert [part.index.tolist() for part in parts] == [[50, 51, 52, 53], [54, 55, 56, 57], [58, 59]]
    assert parts[2].batch["text"] == ["i", "j"]
    assert {(part.batch_idx, part.dataloader) for part in parts} == {(3, 1)}
    assert next(iter(chunk.split(10))) is chunk
    picked = chunk.pick(torch.arange(10) % 4 == 1)
    assert picked.index.tolist() == [51, 55, 59]
    assert picked.batch["x"].tolist() == [1.0, 5.0, 9.0]
    assert chunk.pick(torch.ones(10, dtype=torch.bool)) is chunk
    # A batch of another form cannot be cut: it stays whole.
    odd = Chunk({"x": torch.zeros(3, 10)}, torch.arange(10))
    assert list(odd.split(4)) == [odd]
