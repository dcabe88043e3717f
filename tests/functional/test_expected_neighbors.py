from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_netsim.functional import expected_neighbors, neighbor_dimension, neighbor_radius
from tests.issue_oracles import chance, dimension, radii


def nearest(number: int, k: int, size: int, seed: int = 0) -> Tensor:
    """Return the distances of the k nearest of points spread evenly in a cube, (number, k), ascending."""
    points = torch.rand(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points).sort(dim=1).values[:, 1 : k + 1]


@pytest.mark.parametrize("k", [2, 3, 6, 11])
@pytest.mark.parametrize("number", [7, 30])
def test_against_loops(number: int, k: int) -> None:
    near = nearest(number, min(k, number - 1), 3)
    near[2] = math.nan
    rows = [[] if row[0] != row[0] else row for row in near.tolist()]
    size = neighbor_dimension(near)
    assert size == pytest.approx(dimension(rows))
    radius = neighbor_radius(near)
    slow = radii(dict(enumerate(rows)))
    assert radius[[0, 1, *range(3, number)]].tolist() == pytest.approx([slow[i] for i in slow])
    assert math.isnan(radius[2])
    first = expected_neighbors(near[:, 0], radius, k, size)
    for i, value in slow.items():
        assert -math.expm1(-float(first[i])) == pytest.approx(chance(rows[i][0], value, k, size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_dimension_of_a_cube_is_found(size: int) -> None:
    assert neighbor_dimension(nearest(1000, 20, size)) == pytest.approx(size, rel=0.12)


@pytest.mark.parametrize("k", [2, 5, 8])
def test_distances_that_grow_by_a_power_have_its_dimension(k: int) -> None:
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    for size in (0.5, 1.0, 7.0, 49.0):
        assert neighbor_dimension(ranks.pow(1 / size).expand(5, k)) == pytest.approx(size)


def test_a_set_of_more_than_k_copies_has_a_tenth_of_the_median_radius() -> None:
    near = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 1.0], [0.5, 2.0], [0.5, 4.0]])
    assert neighbor_radius(near).tolist() == [0.1, 0.1, 1.0, 2.0, 4.0]


def test_distances_that_are_all_the_same_or_not_known() -> None:
    assert neighbor_dimension(torch.ones(4, 3)) == math.inf
    assert math.isnan(neighbor_dimension(torch.zeros(4, 3)))
    assert math.isnan(neighbor_dimension(torch.full((4, 3), math.nan)))
    assert math.isnan(neighbor_dimension(torch.zeros(0, 3)))


@pytest.mark.parametrize("size", [0.5, 3.0, math.inf, math.nan])
def test_no_neighbor_as_near_as_a_copy_is_to_be_expected(size: float) -> None:
    none = torch.zeros(2)
    assert expected_neighbors(none, torch.tensor([1.0, 0.0]), 10, size).tolist() == [0.0, 0.0]


def test_beyond_a_radius_of_zero_all_neighbors_are_to_be_expected() -> None:
    assert expected_neighbors(torch.tensor([0.5]), torch.tensor([0.0]), 10, 3.0).item() >= 10


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 2), st.floats(1e-3, 2), st.floats(1e-3, 2), st.integers(1, 50), st.floats(0.1, 60))
def test_nearer_is_rarer(one: float, other: float, radius: float, k: int, size: float) -> None:
    least, most = sorted((one, other))
    found = expected_neighbors(torch.tensor([least, most]), torch.tensor([radius, radius]), k, size)
    assert 0 <= float(found[0]) <= float(found[1])
    wider = expected_neighbors(torch.tensor([least]), torch.tensor([2 * radius]), k, size)
    assert float(wider[0]) <= float(found[0])
