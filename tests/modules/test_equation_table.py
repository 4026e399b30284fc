"""docs/equations.md names, for every equation, a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
NUMBERS = [*range(4, 23), 23, 43]


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_table_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TABLE)
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if test and test not in functions_in(ROOT / file)]
    assert not missing
    assert all((ROOT / file).is_file() for file, _ in named)


def test_every_name_in_the_code_that_the_table_names_exists():
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "moxe").rglob("*.py")))
    rows = [line.split("|")[3] for line in TABLE.splitlines() if line.startswith(("| (", "| -"))]
    names = {name for row in rows for name in re.findall(r"[A-Za-z_]{3,}", " ".join(re.findall(r"`([^`/]+)`", row)))}
    assert not {name for name in names if not re.search(rf"\b{name}\b", source)}


def test_every_numbered_equation_has_a_row_and_a_test_with_its_number():
    named = " ".join(re.findall(r"::(test_equations?_[\w]+)", TABLE))
    for number in NUMBERS:
        first, last = (23, 43) if number >= 23 else (12, 18) if 12 <= number <= 18 else (number, number)
        row = f"| ({first}) |" if first == last else f"| ({first}) to ({last}) |"
        assert row in TABLE
        pattern = rf"equations_{first:02}_to_{last:02}_" if first != last else rf"(equation|and)_{number:02}_"
        assert re.search(pattern, named), number
