"""Picking samples by position, from every kind of loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_netsim._checks import NetsimError
from lightning_netsim.data.samples import Samples, check_positions
from lightning_netsim.data.sources import Chunk
from tests.callbacks.runs import Batches, Stream


class Counting(Dataset[Any]):
    """The numbers from `start` on; counts how often each is read."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.values = torch.arange(start, start + size).float().unsqueeze(1)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        self.reads.append(index)
        return self.values[index]


def stay(batch: Any, number: int) -> Any:
    return batch


def table(chunks: list[Chunk]) -> dict[int, tuple[float, int]]:
    """Return position -> (value of the sample, number of its loader)."""
    rows = [(int(i), (float(x), chunk.dataloader)) for chunk in chunks for i, x in zip(chunk.index, chunk.batch, strict=True)]
    return dict(rows)


@pytest.mark.parametrize("shuffle", [False, True])
def test_with_an_index_only_those_are_read(shuffle: bool) -> None:
    dataset = Counting(100)
    samples = Samples(DataLoader(dataset, batch_size=8, shuffle=shuffle), stay)
    assert table(samples.pick([3, 17, 99])) == {3: (3, 0), 17: (17, 0), 99: (99, 0)}
    assert dataset.reads == [3, 17, 99]
    assert samples.dataset is dataset
    assert samples.source.num_samples == 100


def test_positions_go_on_from_one_loader_to_the_next() -> None:
    loaders = [DataLoader(Counting(10), batch_size=4), DataLoader(Counting(7, start=50), batch_size=3)]
    moved: list[int] = []
    samples = Samples(loaders, lambda batch, number: moved.append(number) or batch)
    assert table(samples.pick([0, 9, 10, 16])) == {0: (0, 0), 9: (9, 0), 10: (50, 1), 16: (56, 1)}
    assert moved == [0, 1]
    assert samples.source.extent == 17
    assert sum(len(chunk.index) for chunk in samples.source) == 17


@pytest.mark.parametrize("loader", [Batches(), DataLoader(Stream(), batch_size=5)], ids=["batches", "stream"])
def test_without_an_index_position_is_the_place_in_the_stream(loader: Any) -> None:
    samples = Samples(loader, stay)
    whole = torch.cat([chunk.batch[0] for chunk in samples.source])
    picked = samples.pick([2, 9, 21])
    assert torch.cat([chunk.index for chunk in picked]).tolist() == [2, 9, 21]
    assert torch.equal(torch.cat([chunk.batch[0] for chunk in picked]), whole[[2, 9, 21]])
    with pytest.raises(NetsimError, match="`queries` to be positions of samples in the data set, from 0 to 21, but got 22"):
        samples.pick([1, 22])


def test_a_subset_is_gone_through_and_any_sample_picked() -> None:
    samples = Samples(DataLoader(Counting(50), batch_size=8), stay, max_samples=6, seed=1)
    assert sum(len(chunk.index) for chunk in samples.source) == 6
    assert table(samples.pick(list(range(50)))) == {i: (i, 0) for i in range(50)}
    with pytest.raises(NetsimError, match="Expected `max_samples` to be a positive int"):
        Samples(DataLoader(Counting(50)), stay, max_samples=0)


def test_first() -> None:
    samples = Samples(DataLoader(Counting(100), batch_size=64), stay)
    assert samples.first().index.tolist() == list(range(32))
    with pytest.raises(NetsimError, match="Expected `loader` to be one that gives at least one batch"):
        Samples([], stay).first()


@pytest.mark.parametrize("positions", [[17, 3], (17, 3), torch.tensor([17, 3]), iter([17, 3])])
def test_positions_are_sorted(positions: Any) -> None:
    assert check_positions("queries", positions, 20) == [3, 17]


@pytest.mark.parametrize(
    ("positions", "size", "complaint"),
    [
        ([3, 20], 20, "positions of samples in the data set, from 0 to 19, but got 20"),
        ([10_000], 10_000, "from 0 to 9,999, but got 10,000"),
        ([-1], None, "positions of samples in the data set, from 0, but got -1"),
        ([3, 5, 3], 20, "different positions, but got 3 more than once"),
        ([1.0], 20, "integers from 0, but got 1.0"),
        (["1"], 20, "integers from 0, but got '1'"),
        ([True], 20, "integers from 0, but got True"),
        ([], 20, "at least one position of a sample, but got none"),
    ],
)
def test_bad_positions_are_named(positions: list[Any], size: int | None, complaint: str) -> None:
    with pytest.raises(NetsimError, match=f"Expected `queries` to be .*{complaint}"):
        check_positions("queries", positions, size)
