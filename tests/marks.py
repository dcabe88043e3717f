"""Which of many cases of a test run each time, and which only with --slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return the names of the cases; those that are not quick are marked as slow."""
    chosen = set(quick)
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]
