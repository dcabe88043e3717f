"""Hold who may import whom: one direction, no cycle, no import inside a function except of optional or heavy packages.

The imports are read from the source, so nothing is run. Each rule is itself tested on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_netsim"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE


@dataclass(frozen=True)
class Room:
    """A module or folder at the top of the package: its layer, and what it may import from elsewhere."""

    layer: int
    packages: frozenset[str]
    """Beside the standard library."""
    siblings: bool = False
    """Whether it may import other rooms of its own layer."""


def room(layer: int, packages: str, siblings: bool = False) -> Room:
    return Room(layer, frozenset(packages.split()), siblings)


MATHS = "torch torchmetrics"
TRAINING = f"{MATHS} lightning"
ANYTHING = f"{TRAINING} torchvision jsonargparse numpy pandas pyarrow matplotlib sklearn"
ROOMS = {
    "_checks": room(0, "torch"),
    "results": room(0, "torch", siblings=True),
    "functional": room(1, "torch"),
    "jacobian": room(1, "torch"),
    "batches": room(1, "torch"),
    "classes": room(2, f"{MATHS} numpy pandas", siblings=True),
    "counting": room(2, MATHS, siblings=True),
    "estimators": room(2, MATHS, siblings=True),
    "features": room(2, MATHS, siblings=True),
    "graph": room(2, f"{MATHS} numpy pandas scipy", siblings=True),
    "index": room(2, f"{MATHS} faiss numpy", siblings=True),
    "isolation": room(2, "torch"),
    "issue_scores": room(2, f"{MATHS} numpy pandas", siblings=True),
    "issues": room(2, f"{MATHS} numpy pandas", siblings=True),
    "joining": room(2, MATHS, siblings=True),
    "measurement": room(2, MATHS, siblings=True),
    "progress": room(2, "tqdm"),
    "losses": room(2, f"{MATHS} torchvision", siblings=True),
    "plan": room(2, f"{MATHS} psutil", siblings=True),
    "preparation": room(2, MATHS, siblings=True),
    "processes": room(2, "torch"),
    "ranking": room(2, MATHS, siblings=True),
    "rates": room(2, "torch"),
    "records": room(2, f"{MATHS} numpy pandas pyarrow", siblings=True),
    "report": room(2, f"{MATHS} torchvision numpy pandas pyarrow matplotlib PIL", siblings=True),
    "samples": room(2, MATHS, siblings=True),
    "samplers": room(2, "torch", siblings=True),
    "sample_table": room(2, MATHS, siblings=True),
    "sources": room(2, MATHS, siblings=True),
    "store": room(2, MATHS, siblings=True),
    "sweeper": room(2, MATHS, siblings=True),
    "swept_set": room(2, MATHS, siblings=True),
    "tables": room(2, f"{MATHS} numpy pandas", siblings=True),
    "tiles": room(2, "torch"),
    "analysis": room(3, f"{TRAINING} numpy pandas", siblings=True),
    "borrowing": room(3, TRAINING),
    "denoising": room(3, f"{TRAINING} pandas", siblings=True),
    "callbacks": room(3, TRAINING),
    "queries": room(3, f"{TRAINING} numpy pandas", siblings=True),
    "transfers": room(3, f"{TRAINING} numpy pandas", siblings=True),
    "mixins": room(3, TRAINING),
    "review": room(3, f"{TRAINING} pandas", siblings=True),
    "reviewed_dataset": room(3, f"{TRAINING} numpy pandas"),
    "demos": room(4, f"{TRAINING} torchvision sklearn numpy"),
    "__init__": room(5, ANYTHING, siblings=True),
    "__main__": room(5, ANYTHING, siblings=True),
    "cli": room(5, ANYTHING, siblings=True),
    "verbs": room(5, ANYTHING, siblings=True),
}
INSIDE_FUNCTIONS = {"faiss", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard", "torchvision"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where."""

    source: str
    line: int
    target: str
    inside_function: bool

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


def module_name(path: Path, root: Path) -> str:
    """Return `lightning_netsim.functional.kernel` for the file of that module; a folder's `__init__` goes by the folder."""
    parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, Path]:
    return {module_name(path, root): path for path in sorted(root.rglob("*.py"))}


def read_imports(root: Path) -> list[Import]:
    modules = read_modules(root)
    return [found for name, path in modules.items() for found in imports_of(name, path, set(modules))]


def imports_of(name: str, path: Path, modules: set[str]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = {inner for function in functions for inner in ast.walk(function)}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        for target in targets(node, package, modules):
            yield Import(name, getattr(node, "lineno", 0), target, node in inside)


def targets(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    """Return the full names that a statement imports; a name that is no module of ours counts as the module it is in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*parents, *([node.module] if node.module else [])])
    if base == PACKAGE and all(alias.name == "__version__" for alias in node.names):
        return []  # the version is stated before anything is imported, so everyone may read it
    return [full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_faults(found: Import) -> Iterator[str]:
    here, there = room_of(found.source), room_of(found.target)
    if here not in ROOMS:
        yield f"{found.place}: `{here}` has no place in the table of rooms"
    elif found.target.partition(".")[0] == PACKAGE:
        if here == there or there not in ROOMS:
            return
        mine, other = ROOMS[here], ROOMS[there]
        if other.layer > mine.layer or (other.layer == mine.layer and not mine.siblings):
            yield f"{found.place}: `{here}` (layer {mine.layer}) imports `{there}` (layer {other.layer})"
    elif (package := found.target.partition(".")[0]) not in sys.stdlib_module_names | ROOMS[here].packages:
        yield f"{found.place}: `{here}` imports `{package}`"


def function_faults(found: Import) -> Iterator[str]:
    if found.inside_function and found.target.partition(".")[0] not in INSIDE_FUNCTIONS:
        yield f"{found.place}: imports `{found.target}` inside a function"


def name_faults(root: Path) -> Iterator[str]:
    for module in read_modules(root):
        if {"utils", "util"} & set(module.split(".")):
            yield f"{module}: say what it is for instead of `utils`"
        if room_of(module) not in ROOMS:
            yield f"{module}: `{room_of(module)}` has no place in the table of rooms"


def cycle_faults(imports: list[Import], modules: set[str]) -> Iterator[str]:
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if found.target in modules and found.target != found.source:
            graph[found.source].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " -> ".join(reversed(error.args[1]))


def faults(root: Path) -> list[str]:
    """Return everything that breaks a rule under `root`, as "module:line: what"."""
    imports = read_imports(root)
    found = [fault for each in imports for rule in (layer_faults, function_faults) for fault in rule(each)]
    return [*name_faults(root), *cycle_faults(imports, set(read_modules(root))), *found]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def test_the_package_keeps_its_layers() -> None:
    assert len(read_modules(ROOT)) > 5, "the package was not found"
    assert not faults(ROOT), "\n".join(faults(ROOT))


def test_lawful_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": f"__version__ = '1'\nfrom {PACKAGE}.callbacks.monitor import Monitor",
        "_checks.py": "import math\nimport torch",
        "functional/__init__.py": f"from {PACKAGE}.functional.kernel import trace",
        "functional/kernel.py": "import torch.nn.functional as F\nfrom .._checks import check\nfrom .blocks import block",
        "functional/blocks.py": f"from {PACKAGE} import __version__",
        "index.py": "def search():\n    import faiss",
        "features.py": f"from {PACKAGE} import functional, index",
        "callbacks/monitor.py": f"from lightning.pytorch import Callback\nfrom {PACKAGE}.features import Features",
    }
    assert faults(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"functional/kernel.py": "import lightning.pytorch"}, "`functional` imports `lightning`"),
        ({"functional/kernel.py": "import numpy as np"}, "`functional` imports `numpy`"),
        ({"features.py": "from matplotlib import pyplot"}, "`features` imports `matplotlib`"),
        ({"callbacks/monitor.py": "def f():\n    import pandas"}, "`callbacks` imports `pandas`"),
        ({"features.py": "if True:\n    import lightning"}, "`features` imports `lightning`"),
        (
            {"functional/kernel.py": f"from {PACKAGE}.features import Features", "features.py": ""},
            "imports `features` (layer 2)",
        ),
        ({"functional/kernel.py": f"from {PACKAGE} import features", "features.py": ""}, "imports `features` (layer 2)"),
        ({"functional/kernel.py": "from ..features import Features", "features.py": ""}, "imports `features` (layer 2)"),
        ({"features.py": f"import {PACKAGE}.cli", "cli.py": ""}, "imports `cli` (layer 5)"),
        ({"features.py": f"from {PACKAGE} import Monitor", "__init__.py": ""}, "imports `__init__` (layer 5)"),
        ({"callbacks/monitor.py": f"from {PACKAGE}.mixins import Mixin", "mixins/__init__.py": ""}, "imports `mixins`"),
        ({"mixins/__init__.py": f"from {PACKAGE}.callbacks import M", "callbacks/__init__.py": ""}, "imports `callbacks`"),
        (
            {"jacobian/capture.py": f"from {PACKAGE}.functional import trace", "functional/__init__.py": ""},
            "`functional` (layer 1)",
        ),
        ({"features.py": "from .index import a", "index.py": "from .features import b"}, "import cycle"),
        ({"index.py": "from .features import a", "features.py": "def f():\n    from .index import b"}, "import cycle"),
        ({"features.py": "def f():\n    import math"}, "inside a function"),
        ({"features.py": "class A:\n    def f(self):\n        from .index import b", "index.py": ""}, "inside a function"),
        ({"functional/utils.py": ""}, "say what it is for"),
        ({"helpers.py": ""}, "no place in the table"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    found = faults(plant(tmp_path, files))
    assert any(complaint in fault for fault in found), found
