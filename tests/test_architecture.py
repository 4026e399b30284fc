"""The shape of the code itself: imports point down, tensor code says its shapes, what is imported is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "moxe").rglob("*.py"))

# Lowest first. A part may import those on lower lines and itself; parts on one line do not import each other, except
# that a recipe and the run it describes are two halves of one thing. `moxe` alone is the package's own __init__.
LAYERS = (
    {"errors"},
    {"files"},
    {"manifest"},
    {"ops"},
    {"modules"},
    {"models"},
    {"moxe"},
    {"data", "evaluation", "observability"},
    {"recipe", "training", "benchmarks", "doctor"},
    {"experiments"},
    {"cli"},
    {"__main__"},
)
ALLOWED_SIDEWAYS = {"recipe", "training"}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """`moxe.ops.segments` -> `ops`; `moxe` -> `moxe`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported_modules(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute module name of every import in a file, those inside functions too."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module == "moxe":  # `from moxe import ops` imports a part, `from moxe import __version__` the package
                parts = {alias.name for alias in node.names} & LEVEL.keys()
                yield from ((node.lineno, f"moxe.{part}") for part in parts)
                if len(parts) < len(node.names):
                    yield node.lineno, "moxe"
            else:
                yield node.lineno, module


def upward_imports(source: str, path: Path) -> list[str]:
    importer = part_of(module_of(path))
    wrong = []
    for line, module in imported_modules(ast.parse(source), path):
        if module.split(".")[0] != "moxe":
            continue
        imported = part_of(module)
        below = LEVEL[imported] < LEVEL[importer]
        sideways = {imported, importer} == ALLOWED_SIDEWAYS
        if imported != importer and not below and not sideways:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {importer} must not import {module}")
    return wrong


def test_every_part_has_its_layer():
    parts = {part_of(module_of(path)) for path in SOURCES}
    assert parts <= LEVEL.keys(), f"give these parts a line in LAYERS: {parts - LEVEL.keys()}"


def test_imports_point_down_only():
    wrong = [message for path in SOURCES for message in upward_imports(path.read_text(encoding="utf-8"), path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "statement",
    [
        "import moxe.models.configuration_moxe",
        "from moxe.modules.norm import Norm",
        "from moxe import training",
        "from moxe import MoxEConfig",
        "from ..modules import norm",
        "from .. import cli",
        "def late():\n    import moxe.data",
    ],
)
def test_an_import_that_points_up_is_found_with_its_line(statement: str):
    path = ROOT / "moxe" / "ops" / "segments.py"
    messages = upward_imports(f"import torch\n{statement}\n", path)
    line = 3 if "def" in statement else 2
    assert len(messages) == 1
    assert messages[0].startswith(f"moxe/ops/segments.py:{line}: ops must not import moxe")


def test_data_evaluation_and_observability_do_not_know_each_other():
    path = ROOT / "moxe" / "evaluation" / "perplexity.py"
    assert upward_imports("from moxe.data.sources import read_documents", path)
    assert not upward_imports("from moxe.models.modeling_moxe import MoxEModel", path)
    assert not upward_imports("from moxe.evaluation import scoring", path)


def test_files_that_handle_tensors_open_with_a_shape_legend():
    """Under ops and modules; the tensors are those of torch, so a file that never imports it has none."""
    missing = []
    for folder in ("ops", "modules"):
        for path in sorted((ROOT / "moxe" / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            handles_tensors = any(module.split(".")[0] == "torch" for _, module in imported_modules(tree, path))
            if handles_tensors and not re.search(r"^Legend: ", ast.get_docstring(tree) or "", re.MULTILINE):
                missing.append(f"{path.relative_to(ROOT)}:1: no line 'Legend: ...' in the module's docstring")
    assert not missing, "\n".join(missing)


def test_what_is_imported_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=!\[; ]", requirement)[0] for requirement in project["dependencies"]}
    distribution = {"yaml": "pyyaml"}
    undeclared = []
    for path in SOURCES:
        for line, module in imported_modules(ast.parse(path.read_text(encoding="utf-8")), path):
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names | {"moxe"} and distribution.get(name, name) not in declared:
                undeclared.append(f"{path.relative_to(ROOT)}:{line}: {name} is not in pyproject.toml")
    assert not undeclared, "\n".join(undeclared)


def test_every_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins if not line.startswith("#")}
    assert all(line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["dev"]]
    assert {re.split(r"[<>=!\[; ]", requirement)[0] for requirement in needed} <= pinned
