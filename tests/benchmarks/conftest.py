"""What the tests of the benchmarks share: the number of threads stays as it was, and problems are small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.problems import Problem, cifar, mnist

NOWHERE = "no-such-directory"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["mnist", "resnet20"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Return five random images, in chunks of two, for one of the networks with its initial weights."""
    return {"mnist": mnist, "resnet20": cifar}[request.param](NOWHERE, 5, chunk_size=2)


@pytest.fixture
def digits() -> Problem:
    """Return five random images, in chunks of two, for the MNIST network."""
    return mnist(NOWHERE, 5, chunk_size=2)
