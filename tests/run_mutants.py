"""Break the package on purpose, one line at a time, and see whether the tests notice.

    python tests/run_mutants.py            every mutant of every room
    python tests/run_mutants.py jacobian   those of one room

A mutant is an entry of `tests/<room>/mutants.yaml`: `file` (below `lightning_netsim/`), `old` (a text that stands there once),
`new`, and, where the tests of the room are many, `tests` (files of that room). It is killed if the tests fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_netsim"


def survives(mutant: dict[str, Any], room: str, tree: Path) -> bool:
    """Return whether the tests of a room pass with a mutant in place."""
    path = tree / PACKAGE / mutant["file"]
    source = path.read_text(encoding="utf-8")
    if source.count(mutant["old"]) != 1:
        raise SystemExit(f"{mutant['file']} has {source.count(mutant['old'])} of {mutant['old']!r}: mend the list.")
    path.write_text(source.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    tests = [f"tests/{room}/{name}" for name in mutant.get("tests", "").split()] or [f"tests/{room}"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    data = os.environ.get("NETSIM_DATA_DIR", str(ROOT.parent / "shared" / "data"))
    environment = {**os.environ, "NETSIM_DATA_DIR": data, "PYTHONPATH": str(tree)}
    try:
        return subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    finally:
        path.write_text(source, encoding="utf-8")


def main(rooms: list[str]) -> int:
    """Run the mutants of some rooms, of all by default; return how many survive."""
    lists = sorted((ROOT / "tests").glob("*/mutants.yaml"))
    alive = total = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".hypothesis"))
        for path in lists:
            room = path.parent.name
            if rooms and room not in rooms:
                continue
            for mutant in yaml.safe_load(path.read_text(encoding="utf-8")):
                total += 1
                if survives(mutant, room, tree):
                    alive += 1
                    print(f"SURVIVES  {mutant['file']}: {mutant['old']!r} -> {mutant['new']!r}", flush=True)
    print(f"{total - alive} of {total} mutants killed")
    return alive


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]) > 0)
