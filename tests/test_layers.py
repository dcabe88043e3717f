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
    """A folder of the package, or a module at its top: its layer, and what it may import beside lower rooms."""

    layer: int
    packages: frozenset[str]
    """Beside the standard library."""


def room(layer: int, packages: str) -> Room:
    return Room(layer, frozenset(packages.split()))


TRAINING = "torch torchmetrics lightning"
TABLES = "torch numpy pandas pyarrow"
ANYTHING = f"{TRAINING} {TABLES} torchvision jsonargparse matplotlib sklearn"
ROOMS = {
    "_checks": room(0, "torch"),
    "functional": room(1, "torch"),
    "data": room(1, "torch"),
    "jacobian": room(2, "torch"),
    "estimators": room(3, "torch torchmetrics faiss numpy"),
    "losses": room(3, "torch torchmetrics torchvision"),
    "measurement": room(4, "torch psutil tqdm"),
    "mixins": room(5, TRAINING),
    "records": room(5, f"{TABLES} scipy"),
    "report": room(6, f"{TABLES} torchvision matplotlib PIL"),
    "analysis": room(7, f"{TRAINING} {TABLES}"),
    "callbacks": room(7, TRAINING),
    "demos": room(8, f"{TRAINING} torchvision sklearn numpy"),
    "cli": room(9, ANYTHING),
    "__init__": room(10, ANYTHING),
    "__main__": room(10, ANYTHING),
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
    # The version is stated before anything is imported, so everyone may read it.
    names = [f"{base}.{alias.name}" for alias in node.names if (base, alias.name) != (PACKAGE, "__version__")]
    return [full if full in modules else base for full in names]


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
        mine, other = ROOMS[here].layer, ROOMS[there].layer
        if other >= mine:
            yield f"{found.place}: `{here}` (layer {mine}) imports `{there}` (layer {other})"
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
        "estimators/__init__.py": "",
        "estimators/index.py": "def search():\n    import faiss",
        "measurement/sweep.py": f"from {PACKAGE} import functional, estimators",
        "callbacks/monitor.py": f"from lightning.pytorch import Callback\nfrom {PACKAGE}.measurement.sweep import Sweep",
    }
    assert faults(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"functional/kernel.py": "import lightning.pytorch"}, "`functional` imports `lightning`"),
        ({"functional/kernel.py": "import numpy as np"}, "`functional` imports `numpy`"),
        ({"jacobian/features.py": "from matplotlib import pyplot"}, "`jacobian` imports `matplotlib`"),
        ({"callbacks/monitor.py": "def f():\n    import pandas"}, "`callbacks` imports `pandas`"),
        ({"measurement/sweep.py": "if True:\n    import lightning"}, "`measurement` imports `lightning`"),
        (
            {"functional/kernel.py": f"from {PACKAGE}.jacobian.features import F", "jacobian/features.py": ""},
            "imports `jacobian` (layer 2)",
        ),
        (
            {"functional/kernel.py": f"from {PACKAGE} import jacobian", "jacobian/__init__.py": ""},
            "imports `jacobian` (layer 2)",
        ),
        (
            {"functional/kernel.py": "from ..jacobian.features import F", "jacobian/features.py": ""},
            "imports `jacobian` (layer 2)",
        ),
        ({"analysis/analyze.py": f"import {PACKAGE}.cli", "cli.py": ""}, "imports `cli` (layer 9)"),
        ({"analysis/analyze.py": f"from {PACKAGE} import Monitor", "__init__.py": ""}, "imports `__init__` (layer 10)"),
        ({"callbacks/monitor.py": f"from {PACKAGE}.analysis import analyze", "analysis/__init__.py": ""}, "imports `analysis`"),
        ({"data/labels.py": f"from {PACKAGE}.functional import f", "functional/__init__.py": ""}, "`functional` (layer 1)"),
        ({"data/a.py": "from .b import b", "data/b.py": "from .a import a"}, "import cycle"),
        ({"data/a.py": "from .b import b", "data/b.py": "def f():\n    from .a import a"}, "import cycle"),
        ({"data/a.py": "def f():\n    import math"}, "inside a function"),
        ({"data/a.py": "class A:\n    def f(self):\n        from .b import b", "data/b.py": ""}, "inside a function"),
        ({"functional/utils.py": ""}, "say what it is for"),
        ({"helpers.py": ""}, "no place in the table"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    found = faults(plant(tmp_path, files))
    assert any(complaint in fault for fault in found), found
