"""Weights that change in the course of training."""

from __future__ import annotations

import pytest

from lightning_netsim import NetsimError
from lightning_netsim.mixins.schedule import Schedule


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (10, 1.0), (15, 2.0), (20, 3.0), (30, 1.5), (40, 0.0), (1000, 0.0)])
def test_points_are_joined_by_straight_lines(step: int, weight: float) -> None:
    assert Schedule([(10, 1.0), (20, 3.0), (40, 0.0)])(step) == weight


def test_a_number_stays_and_a_function_is_called() -> None:
    assert [Schedule(0.3)(step) for step in (0, 7)] == [0.3, 0.3]
    assert [Schedule(lambda step: step / 2)(step) for step in (0, 7)] == [0.0, 3.5]
    assert Schedule(0.3).is_constant
    assert Schedule([[5, 0.3]]).is_constant
    assert not Schedule([[5, 0.3], [6, 0.3]]).is_constant
    assert not Schedule(lambda step: 1.0).is_constant


@pytest.mark.parametrize(
    "weight", ["0.1", None, [], [1, 2], [(5, 1.0), (5, 2.0)], [(5, 1.0), (4, 2.0)], float("nan"), True, [("a", 1)]]
)
def test_anything_else_is_refused(weight: object) -> None:
    with pytest.raises(NetsimError, match="`weight` to be a number, a list of points"):
        Schedule(weight)  # type: ignore[arg-type]
