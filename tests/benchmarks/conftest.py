"""What the tests of the benchmarks share: the number of threads stays as it was, and problems are small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.problems import Problem, cifar, mnist

NOWHERE = "no-such-directory"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def patterns(problem: Problem) -> Problem:
    """Return the problem with images of large squares: gradients of noise are all alike, and hide what is wrong."""
    number, channels, side, _ = problem.images.shape
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(0, 256, (number, channels, 4, 4), generator=generator)
    kept = torch.rand(number, 1, 4, 4, generator=generator) < torch.linspace(0.1, 0.9, number).view(-1, 1, 1, 1)
    large = (squares * kept).repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    return replace(problem, images=large.to(torch.uint8))


@pytest.fixture(params=["mnist", "resnet20"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Return five images, in chunks of two, for one of the networks with its initial weights."""
    return patterns({"mnist": mnist, "resnet20": cifar}[request.param](NOWHERE, 5, chunk_size=2))


@pytest.fixture
def digits() -> Problem:
    """Return five images, in chunks of two, for the MNIST network."""
    return patterns(mnist(NOWHERE, 5, chunk_size=2))
