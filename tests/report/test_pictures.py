"""Small copies of the samples become pictures, found by position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lightning_netsim.measurement.result import SampleSet
from lightning_netsim.report.pictures import Pictures


def sample_set(index: list[int], shown: list[Any] | None) -> SampleSet:
    return SampleSet(torch.tensor(index), None, None, torch.zeros(len(index), dtype=torch.int64), shown)


def result(queries: SampleSet, reference: SampleSet | None = None) -> Any:
    return SimpleNamespace(
        queries=queries, reference=reference or queries, compares_with_itself=reference is None or reference is queries
    )


def level(value: float) -> torch.Tensor:
    return torch.full((1, 2, 2), value)


def test_nothing_found_shows_nothing() -> None:
    pictures = Pictures(None, None)
    assert pictures.queries is None
    assert pictures.reference is None


def test_samples_are_found_by_their_position_in_the_data_set() -> None:
    pictures = Pictures(result(sample_set([4, 9], [level(0.0), level(1.0)])), None)
    assert pictures.queries is not None
    assert np.array_equal(pictures.queries(9), np.full((2, 2), 255))
    assert np.array_equal(pictures.queries(4), np.zeros((2, 2)))
    assert pictures.reference is pictures.queries


def test_text_stays_text() -> None:
    pictures = Pictures(result(sample_set([0, 1], ["a", "b"])), None)
    assert pictures.queries is not None
    assert pictures.queries(1) == "b"


def test_each_set_has_its_own_normalization() -> None:
    def dataset(mean: float) -> Any:
        return SimpleNamespace(transform=SimpleNamespace(mean=[mean], std=[1.0]))

    queries, reference = sample_set([0], [level(-0.5)]), sample_set([0], [level(-0.2)])
    pictures = Pictures(result(queries, reference), dataset(0.5), dataset(1.0))
    assert pictures.queries is not None
    assert pictures.reference is not None
    assert np.array_equal(pictures.queries(0), np.zeros((2, 2)))
    assert np.array_equal(pictures.reference(0), np.full((2, 2), 204))


def test_sets_may_have_pictures_apart() -> None:
    pictures = Pictures(result(sample_set([0], None), sample_set([0], ["x"])), None)
    assert pictures.queries is None
    assert pictures.reference is not None
    assert pictures.reference(0) == "x"
