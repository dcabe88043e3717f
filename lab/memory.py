"""Measure the memory that a function needs, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

# What the allocator keeps of freed memory is not what a method needs, and differs from process to process by a half: with these
# settings, which glibc reads, it returns larger tensors to the system at once, and peaks agree to 1 %.
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def growth_megabytes(function: Callable[[], object]) -> float:
    """Run a function and return by how much the resident memory of this process grew at most, in MB.

    Another thread looks at it every millisecond. The operating system's own record of the peak is no use here: it includes what
    was held before.
    """
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return round((peak - before) / 1e6, 1)


def peaks_megabytes(script: Path, runs: Sequence[Sequence[str]]) -> list[float]:
    """Return by how much the memory of a fresh process of a script grows at most, in MB, for each list of arguments.

    Two run at a time, for what else runs does not matter. The last line that the script prints is `{"megabytes": ...}`.
    """

    def peak(arguments: Sequence[str]) -> float:
        command = [sys.executable, str(script), *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | RETURN_AT_ONCE).stdout
        return float(json.loads(answer.splitlines()[-1])["megabytes"])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(peak, runs))
