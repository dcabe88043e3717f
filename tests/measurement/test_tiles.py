"""Tiles of a list of pairs: every pair is in one, and pairs with a sample in common come together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_netsim.measurement.tiles import tiles


def pairs_of(listed: Tensor) -> set[tuple[int, int]]:
    return {(row, sample) for row, samples in enumerate(listed.tolist()) for sample in samples if sample >= 0}


@pytest.mark.parametrize("most", [1, 7, 30, 10_000])
@pytest.mark.parametrize("absent", [0.0, 0.5, 0.95])
def test_every_pair_is_in_one_tile_of_no_more_than_asked(most: int, absent: float) -> None:
    listed = torch.randint(0, 50, (80, 6)).masked_fill(torch.rand(80, 6) < absent, -1)
    found = list(tiles(listed, most))
    rows = torch.cat([rows for rows, _ in found])
    assert sorted(rows.tolist()) == (listed >= 0).any(1).nonzero().squeeze(1).tolist()
    for rows, samples in found:
        wanted = {sample for _, sample in pairs_of(listed[rows])}
        assert samples.tolist() == sorted(wanted)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 1 or len(rows) + len(samples) <= most


def test_rows_with_the_same_samples_come_together() -> None:
    group = torch.arange(12) % 3
    listed = 10 * group[:, None] + torch.arange(4)
    found = list(tiles(listed, 8))
    assert [rows.tolist() for rows, _ in found] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [samples.tolist() for _, samples in found] == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]


def test_rows_without_common_samples_fill_a_tile() -> None:
    found = list(tiles(torch.arange(10)[:, None], 8))
    assert [rows.tolist() for rows, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_no_pairs_make_no_tile() -> None:
    assert not list(tiles(torch.full((3, 2), -1), 5))
    assert not list(tiles(torch.zeros(0, 2, dtype=torch.int64), 5))
