"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors gain nothing from a second thread, and lose much where another process wants the same cores.
    torch.set_num_threads(int(os.environ.get("NETSIM_TEST_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if not config.getoption("--slow"):
        skipped["slow"] = pytest.mark.skip(reason="slow: give --slow, or run `make test-all`")
    for item in items:
        for name, mark in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """Return the directory with real data sets; a test that asks for it is skipped where there is none."""
    path = Path(os.environ.get("NETSIM_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("needs real data: set NETSIM_DATA_DIR to a directory with MNIST/raw in it")
    return path
