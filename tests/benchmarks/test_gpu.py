"""The script for a CUDA device, at a size that shows on a CPU that it works."""

from __future__ import annotations

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_quick() -> None:
    figures = gpu.main(["--quick"])
    assert figures["counts"]["ratio_plain"] > 0
    assert figures["neighbors"]["plan"] == "store"
    assert figures["neighbors"]["recall"] == 1.0
    assert 0.9 < figures["large"]["recall"] <= 1.0


def test_parts_are_checked() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--part", "everything"])
