"""The built-in corpus: the English that ships inside every CPython, so that a first run needs no download.

It is the language reference behind `help()` (`pydoc_data.topics`) and the docstrings of the standard library, read from
the sources without importing them. The same CPython gives the same documents in the same order on every machine that
has the whole standard library (some distributions package tkinter, idlelib or distutils by themselves).
"""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from moxe.errors import UserError

# Folders of the standard library that hold no documentation of it: tests, third-party packages, binary modules.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"})
TOPICS_FILE = "pydoc_data/topics.py"
# A repeated paragraph with fewer letters ("See also:", "Return a string.") is ordinary language, not a copy.
MIN_LETTERS_OF_A_COPY = 30


def builtin_files() -> list[Path]:
    """The source files that the built-in corpus is read from, sorted by their path in the standard library.

    Raises:
        UserError: if this Python has no sources of its standard library (embedded or frozen builds).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = [name for name in sorted(files) if _is_documentation(name)]
    if TOPICS_FILE not in kept:
        raise UserError(
            f"The built-in corpus needs the sources of Python's standard library, but {root / TOPICS_FILE} is missing; "
            "install the whole standard library, or set data.source to your own text."
        )
    return [files[name] for name in kept]


def builtin_documents() -> list[str]:
    """The documents of the built-in corpus, about 2 MB, without repetitions, in a fixed order.

    A document is one section of the language reference, or all docstrings of one module in the order of its source. A
    paragraph that appeared before, in whatever case and spacing, is left out: the reference's topics quote each other
    and modules copy docstrings, and a held-out document must not have been trained on.

    Raises:
        UserError: see `builtin_files`.
    """
    return list(_documents())


@cache  # parsing the standard library takes seconds, and a corpus is read several times
def _documents() -> tuple[str, ...]:
    files = builtin_files()
    topics_file = next(path for path in files if path.as_posix().endswith(TOPICS_FILE))
    sections = [section for topic in _topics(topics_file) for section in _sections(topic)]
    modules = [_docstrings(path) for path in files if path != topics_file]
    return tuple(_without_copies(sections + modules))


def _is_documentation(name: str) -> bool:
    folders = name.split("/")[:-1]
    # config-<version>-<platform> holds the build's own scripts, which differ between platforms.
    return not any(folder in EXCLUDED_FOLDERS or folder.startswith("config-") for folder in folders)


def _topics(path: Path) -> list[str]:
    """The texts of `topics = {name: text, …}`, sorted by name."""
    for statement in _parse(path).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return [topics[name] for name in sorted(topics)]
    raise UserError(f"The built-in corpus cannot be read: {path} assigns no dictionary of topics.")


def _sections(topic: str) -> Iterator[str]:
    """Cuts a topic at its headings, which are lines underlined by one of * = - ~ ^."""
    headings = r"^(?=(?!\s)\S[^\n]*\n([*=\-~^])\1{2,}$)"
    yield from re.split(headings, topic, flags=re.MULTILINE)[::2]


def _docstrings(path: Path) -> str:
    """All docstrings of a module, in the order of its source, divided by blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield docstring
        # Statements alone can hold further definitions; expressions, most of the tree, are skipped.
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from visit(child)

    try:
        return "\n\n".join(visit(_parse(path)))
    except (SyntaxError, UnicodeDecodeError):  # a module kept for other versions of Python documents nothing here
        return ""


def _parse(path: Path) -> ast.Module:
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escape sequences
        return ast.parse(file.read())


def _without_copies(documents: Iterable[str]) -> Iterator[str]:
    """Leaves out each paragraph that came before, and each document that holds nothing else."""
    seen: set[str] = set()
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            letters = re.sub(r"[\W\d_]+", "", paragraph).casefold()
            if len(letters) < MIN_LETTERS_OF_A_COPY or letters not in seen:
                paragraphs.append(paragraph)
            if len(letters) >= MIN_LETTERS_OF_A_COPY:
                seen.add(letters)
        text = "\n\n".join(paragraphs).strip()
        if len(re.sub(r"[\W\d_]+", "", text)) >= MIN_LETTERS_OF_A_COPY:
            yield text
