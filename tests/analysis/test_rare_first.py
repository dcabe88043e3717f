from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_netsim import NetsimError
from lightning_netsim.analysis.rare_first import RareFirstSampler
from lightning_netsim.records.record import Record, record_directory, write_record

COUNTS = [40.0, 1.0, 7.0, 300.0, 2.5, 90.0, 7.0, 12.0]
EVERYTHING = list(range(len(COUNTS)))


class Indices(Dataset[int]):
    """Entry i is i."""

    def __len__(self) -> int:
        return len(COUNTS)

    def __getitem__(self, index: int) -> int:
        return index


class Drawing(LightningModule):
    """Write down, epoch by epoch, which samples each batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.drawn: dict[int, list[int]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.setdefault(self.current_epoch, []).extend(batch.tolist())
        return self.layer(batch.float().unsqueeze(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(sampler: RareFirstSampler, epochs: int, ckpt_path: Path | None = None, workers: int = 0) -> tuple[Drawing, Trainer]:
    model = Drawing()
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, **quiet)
    loader = DataLoader(Indices(), batch_size=3, sampler=sampler, num_workers=workers)
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=bool(ckpt_path))
    return model, trainer


def probability(order: tuple[int, ...], weights: list[float]) -> float:
    """Return the probability to draw samples in `order`: the product of w_i over what is left at each draw."""
    left, result = list(weights), 1.0
    for index in order:
        result *= left[index] / sum(left)
        left[index] = 0.0
    return result


def make_run(directory: Path, counts: list[float], index: list[int] | None = None, loader: int = 0, epoch: int = 0) -> Path:
    size = len(counts)
    index = list(range(size)) if index is None else index
    samples = pd.DataFrame(
        {
            "sample_id": index,
            "index": index,
            "dataloader": [loader] * size,
            "soft_count": np.array(counts),
            "neighbor_fraction": np.array(counts) / size,
            "gradient_norm": np.ones(size),
            "rank": np.ones(size, dtype=int),
        }
    )
    neighbors = pd.DataFrame({"index": [0], "rank": [1], "neighbor": [1], "similarity": [0.5]})
    return write_record(record_directory(directory / "netsim", epoch, epoch), Record(samples, neighbors))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_orders_have_the_probabilities_of_draws_one_after_the_other(power: float) -> None:
    counts, epochs = [1.0, 2.0, 5.0], 4000
    sampler = RareFirstSampler(counts, power=power, seed=3)
    seen: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(3)), 0)
    for epoch in range(epochs):
        seen[tuple(sampler.order(epoch).tolist())] += 1
    for order, times in seen.items():
        p = probability(order, [count**-power for count in counts])
        assert abs(times / epochs - p) < 4 * math.sqrt(p * (1 - p) / epochs), order


def test_counts_below_one_weigh_as_one() -> None:
    low, ones = (RareFirstSampler(counts, power=1.0) for counts in ([-3.0, 0.0, 0.5, 4.0], [1.0, 1.0, 1.0, 4.0]))
    assert all(torch.equal(low.order(epoch), ones.order(epoch)) for epoch in range(20))
    extreme = RareFirstSampler([1e300, 1e-300, 1e150], power=50.0)
    assert all(extreme.order(epoch).tolist() == [1, 2, 0] for epoch in range(20))


def test_infinite_power_is_the_ascending_order_with_ties_shuffled() -> None:
    sampler = RareFirstSampler(COUNTS, power=math.inf)
    orders = [sampler.order(epoch).tolist() for epoch in range(40)]
    assert all([COUNTS[i] for i in order] == sorted(COUNTS) for order in orders)
    assert {tuple(order) for order in orders} == {(1, 4, 2, 6, 7, 0, 5, 3), (1, 4, 6, 2, 7, 0, 5, 3)}


def test_an_epoch_draws_each_sample_once_or_the_number_asked_for() -> None:
    assert sorted(RareFirstSampler(COUNTS)) == EVERYTHING
    few = RareFirstSampler(COUNTS, num_samples=3)
    drawn = list(few)
    assert len(few) == len(drawn) == len(set(drawn)) == 3
    assert drawn == list(RareFirstSampler(COUNTS))[:3]
    assert all(type(index) is int for index in drawn)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    counts = torch.ones(50)
    sampler = RareFirstSampler(counts, seed=1)
    before = torch.get_rng_state()
    orders = [list(sampler) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before), "global random numbers are left alone"
    torch.manual_seed(99)
    assert [RareFirstSampler(counts, seed=1).order(epoch).tolist() for epoch in range(3)] == orders
    different = [
        tuple(RareFirstSampler(counts, seed=seed).order(epoch).tolist()) for seed in (0, 1, 2, -1) for epoch in range(3)
    ]
    assert len(set(different)) == 12, "seed and epoch do not stand in for each other"


def test_a_plain_loop_gets_a_new_order_each_time_even_if_it_was_left() -> None:
    sampler, other = RareFirstSampler(COUNTS), RareFirstSampler(COUNTS)
    loader = DataLoader(Indices(), batch_size=3, sampler=sampler)
    assert [torch.cat(list(loader)).tolist() for _ in range(3)] == [other.order(epoch).tolist() for epoch in range(3)]
    next(iter(sampler))
    assert list(sampler) == other.order(4).tolist(), "epoch 3 was begun and left"
    iter(sampler)
    assert list(sampler) == other.order(5).tolist(), "an iterator that draws nothing begins no epoch"


def test_set_epoch_names_the_next_order() -> None:
    sampler = RareFirstSampler(COUNTS)
    for epoch in (5, 0, 0, 2):
        sampler.set_epoch(epoch)
        assert list(sampler) == sampler.order(epoch).tolist()
    sampler.set_epoch(2)
    next(iter(sampler))
    sampler.set_epoch(2)
    assert list(sampler) == sampler.order(2).tolist()
    assert list(sampler) == sampler.order(3).tolist()


@pytest.mark.parametrize("drawn", [0, 1, 5, 7])
@pytest.mark.parametrize("named", [False, True])
def test_resumes_within_an_epoch(drawn: int, named: bool) -> None:
    sampler = RareFirstSampler(COUNTS, seed=4)
    list(sampler)
    running = iter(sampler)
    first = list(itertools.islice(running, drawn))
    state = sampler.state_dict()
    assert {type(value) for value in state.values()} == {int, float}
    resumed = RareFirstSampler(COUNTS, seed=4)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    if named:
        resumed.set_epoch(1 if drawn else state["epoch"])
    rest = list(resumed)
    assert rest == list(running)
    assert sorted(first + rest) == EVERYTHING
    assert list(resumed) == list(sampler)


def test_another_epoch_drops_the_rest_of_the_interrupted_one() -> None:
    sampler, resumed = RareFirstSampler(COUNTS), RareFirstSampler(COUNTS)
    next(iter(sampler))
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(1)
    assert list(resumed) == sampler.order(1).tolist()


class StatefulBatches:
    """The iterator of batches as torchdata's StatefulDataLoader has it: it makes the sampler's iterator before it loads."""

    def __init__(self, sampler: RareFirstSampler) -> None:
        self.sampler = sampler
        self.drawing: Iterator[int] = iter(sampler)

    def __next__(self) -> list[int]:
        return list(itertools.islice(self.drawing, 3))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self.drawing = iter(self.sampler)


@pytest.mark.parametrize("batches", [1, 2])
def test_resumes_under_the_protocol_of_stateful_loaders(batches: int) -> None:
    sampler, again = RareFirstSampler(COUNTS, seed=2), RareFirstSampler(COUNTS, seed=2)
    running = StatefulBatches(sampler)
    for _ in range(batches):
        next(running)
    resumed = StatefulBatches(again)
    resumed.load_state_dict(sampler.state_dict())
    again.set_epoch(0)  # Lightning does so after the loader has made its iterator
    assert [next(resumed) for _ in range(3)] == [next(running) for _ in range(3)]
    assert next(StatefulBatches(again)) == next(StatefulBatches(sampler)) == sampler.order(1).tolist()[:3]


def test_lightning_fits_get_an_order_for_each_epoch_and_resume_with_it(tmp_path: Path) -> None:
    sampler = RareFirstSampler(COUNTS, power=1.0, seed=6)
    whole, _ = fit(sampler, epochs=4)
    assert whole.drawn == {epoch: sampler.order(epoch).tolist() for epoch in range(4)}
    assert len(set(map(tuple, whole.drawn.values()))) == 4
    first, trainer = fit(RareFirstSampler(COUNTS, power=1.0, seed=6), epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    second, _ = fit(RareFirstSampler(COUNTS, power=1.0, seed=6), epochs=4, ckpt_path=tmp_path / "two.ckpt")
    assert {**first.drawn, **second.drawn} == whole.drawn
    assert sorted(second.drawn) == [2, 3]


@pytest.mark.parametrize("num_samples", [8, 4])
def test_two_processes_share_what_is_drawn(num_samples: int) -> None:
    whole = RareFirstSampler(COUNTS, num_samples, seed=1)
    for epoch in range(3):
        parts = []
        for rank in range(2):
            sampler = RareFirstSampler(COUNTS, num_samples, seed=1)
            wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank, shuffle=False)
            wrapper.set_epoch(epoch)
            parts.append(list(wrapper))
        assert [index for pair in zip(*parts, strict=True) for index in pair] == whole.order(epoch).tolist()


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_counts_that_are_not_finite_are_the_median(gap: float) -> None:
    assert RareFirstSampler([1.0, gap, 9.0, 2.0]).counts.tolist() == [1.0, 2.0, 9.0, 2.0]
    assert RareFirstSampler([1.0, gap, 9.0]).counts.tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor(COUNTS, dtype=torch.float64, requires_grad=True),
        np.array(COUNTS),
        pd.Series(COUNTS, index=range(10, 18)),
        tuple(COUNTS),
    ],
    ids=lambda counts: type(counts).__name__,
)
def test_counts_may_be_any_column(counts: Any) -> None:
    sampler = RareFirstSampler(counts)
    assert sampler.counts.tolist() == COUNTS
    assert list(sampler) == list(RareFirstSampler(COUNTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": []}, "`counts` to be a 1-D"),
        ({"counts": 3.0}, "`counts` to be a 1-D"),
        ({"counts": torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({"counts": ["a", "b"]}, "`counts` to be a 1-D"),
        ({"counts": [1.0, None]}, "`counts` to be a 1-D"),
        ({"counts": torch.ones(3, dtype=torch.complex64)}, "complex64"),
        ({"counts": [math.nan, math.inf]}, "finite for one sample at least"),
        ({"num_samples": 9}, "at most 8"),
        ({"num_samples": 0}, "`num_samples` to be a positive int"),
        ({"num_samples": 2.0}, "`num_samples` to be a positive int"),
        ({"power": -1.0}, "`power`"),
        ({"power": math.nan}, "`power`"),
        ({"power": "inf"}, "`power`"),
        ({"power": True}, "`power`"),
        ({"seed": 1.5}, "`seed` to be an int"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetsimError, match=message):
        RareFirstSampler(**{"counts": COUNTS, **arguments})


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (RareFirstSampler(COUNTS, seed=1), "seed"),
        (RareFirstSampler(COUNTS, power=2.0), "power"),
        (RareFirstSampler(COUNTS, num_samples=7), "num_samples"),
        (RareFirstSampler(COUNTS[:7]), "dataset_size"),
        (RareFirstSampler([*COUNTS[:7], 13.0]), "counts"),
    ],
    ids=["seed", "power", "num_samples", "dataset_size", "counts"],
)
def test_a_state_of_another_sampler_is_refused(other: RareFirstSampler, name: str) -> None:
    with pytest.raises(NetsimError, match=rf"state_dict\['{name}'\]` to be .* Resume with the data set"):
        RareFirstSampler(COUNTS).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 8}, "less than 8"),
        ({"position": -1}, r"\['position'\]` to be an int of at least 0"),
        ({"epoch": 0.5}, r"\['epoch'\]` to be an int of at least 0"),
        ({"epoch": True}, r"\['epoch'\]` to be an int of at least 0"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = RareFirstSampler(COUNTS)
    with pytest.raises(NetsimError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    with pytest.raises(NetsimError, match=r"what `RareFirstSampler.state_dict` returned"):
        sampler.load_state_dict({"epoch": 1, "position": 0})


def test_reads_the_newest_record_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path, COUNTS[::-1], epoch=2)
    newest = make_run(tmp_path, COUNTS, epoch=10)
    for path in (tmp_path, tmp_path / "netsim", str(newest)):
        assert RareFirstSampler.from_record(path, 8).counts.tolist() == COUNTS
    sampler = RareFirstSampler.from_record(tmp_path, 8, num_samples=2, power=math.inf, seed=7)
    assert (list(sampler), sampler.seed) == ([1, 4], 7)


def test_samples_that_were_not_measured_are_the_median(tmp_path: Path) -> None:
    make_run(tmp_path, [5.0, math.nan, 3.0, 1.0], index=[4, 2, 0, 5])
    assert RareFirstSampler.from_record(tmp_path, 6).counts.tolist() == [3.0, 3.0, 3.0, 3.0, 5.0, 1.0]
    make_run(tmp_path, COUNTS, loader=1, epoch=1)
    with pytest.raises(NetsimError, match="a record with soft counts"):  # Only the first loader is read.
        RareFirstSampler.from_record(tmp_path, 8)


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        (COUNTS, 7, "`dataset_size` to be at least 8, .* but got 7: counts of another data set"),
        (COUNTS, 20, "`dataset_size` to be 8, .* but got 20: counts of another data set"),
        (COUNTS, 0, "`dataset_size` to be a positive int"),
        ([math.nan] * 8, 8, "a record with soft counts"),
    ],
)
def test_records_of_another_data_set_are_refused(tmp_path: Path, counts: list[float], size: int, message: str) -> None:
    make_run(tmp_path, counts)
    with pytest.raises(NetsimError, match=message):
        RareFirstSampler.from_record(tmp_path, size)
