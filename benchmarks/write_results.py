"""Run all benchmarks and write what came out to `docs/results/benchmarks.md`: their tables, the bounds, machine and versions.

    python benchmarks/write_results.py [--only NAME ...] [--quick] [--data-dir DIRECTORY] [--threads 2]

Each script writes its own tables. Its figures are kept in `runs/NAME/figures.json`; with `--only`, those of the others are read
from there. What stands in the page outside of the marks is written by hand and stays. With `--quick` nothing is written.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Bound, Size, Study, format_number, format_table, script, write_section
from lab.study import PAGES

NAMES = ("soft_counts", "peers", "sketch", "neighbors", "scaling", "similarity_cost", "ctv", "patch_mmd")
SIZES = {"only": Size(NAMES, None, "scripts to run", choices=NAMES)}
PACKAGES = (
    *("lightning-netsim", "torch", "torchvision", "lightning", "faiss-cpu", "pytorch-metric-learning"),
    *("backpack-for-pytorch", "opacus", "captum", "dattri", "traker", "geomloss"),
)


def known_figures(name: str) -> dict[str, Any]:
    """Return the figures of the last full run of a script; none if there was none."""
    path = Path("runs") / name / "figures.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def promises() -> str:
    """Return the table of what was promised."""
    rows = []
    for name in NAMES:
        figures = known_figures(name)
        for key, bound in import_module(f"benchmarks.{name}").main.bounds.items():
            value, limit = figures.get(key), f"{'≥' if bound.at_least else '≤'} {format_number(bound.limit)}"
            held = "not measured" if value is None else "held" if bound.holds(value) else "**missed**"
            if value is not None and bound.holds(value) and bound.aim is not None:
                held += ", aim too" if Bound(bound.aim, at_least=bound.at_least).holds(value) else ", aim missed"
            cells = (limit, format_number(bound.aim), format_number(value), held)
            rows.append((bound.what, f"`{name}.py`: `{key}`", *cells))
    return format_table(("what", "figure", "bound", "aim", "measured", ""), rows, left=2)


def machine(threads: int) -> str:
    """Return a sentence on the time taken, the processor, the memory and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    installed = {found.name.lower(): found.version.partition("+")[0] for found in metadata.distributions()}
    versions = ", ".join(f"{package} {installed.get(package, '(not installed)')}" for package in PACKAGES)
    minutes = sum(known_figures(name).get("seconds", 0) for name in NAMES) / 60
    return (
        f"Written by `make bench`, which took {minutes:.0f} minutes.\n"
        f"Measured on {cpu}, {psutil.cpu_count()} cores, {threads} threads, {psutil.virtual_memory().total / 2**30:.0f} GB of "
        f"memory, no GPU; Python {platform.python_version()}, {versions}."
    )


@script(SIZES, threads=2)
def main(study: Study) -> dict[str, Any]:
    """Run the scripts and write the page; say which failed."""
    options, failed = study.options, []
    for name in options.only:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *(["--quick"] if options.quick else [])]
        command += ["--threads", str(options.threads), "--data-dir", options.data_dir]
        print(f"\n== {' '.join(command[1:])}", flush=True)
        failed += [name] if subprocess.run(command).returncode else []
    print(f"\n{promises()}\n\n{machine(options.threads)}")
    if not options.quick:
        write_section(PAGES / "benchmarks.md", "promises", promises())
        write_section(PAGES / "benchmarks.md", "machine", machine(options.threads))
        if "scaling" in options.only and "scaling" not in failed:
            shutil.copy("runs/scaling/growth.png", PAGES.parent / "images" / "growth.png")
    return {"failed": failed}


if __name__ == "__main__":
    sys.exit(len(main()["failed"]))
