import re
from itertools import pairwise

import pytest

from moxe.data import builtin
from moxe.data.builtin import builtin_documents, builtin_files
from moxe.errors import UserError

LONG = "A sentence that is long enough to count as a paragraph, {}."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a standard library of its own and gives the documents in it."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})

    def write(topics, **modules):
        for name, source in {"pydoc_data/topics": f"topics = {topics!r}", **modules}.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return list(builtin._documents.__wrapped__())

    return write


def test_it_holds_the_language_reference_and_the_docstrings_of_the_standard_library():
    documents = builtin_documents()
    assert any(document.startswith('The "assert" statement') for document in documents)
    assert any("JSON (JavaScript Object Notation)" in document for document in documents)
    assert 1_500_000 < sum(len(document.encode()) for document in documents) < 4_000_000


def test_no_paragraph_of_some_length_comes_twice():
    text = "\n\n".join(builtin_documents())
    letters = (re.sub(r"[\W\d_]+", "", paragraph).casefold() for paragraph in text.split("\n\n"))
    long = sorted(paragraph for paragraph in letters if len(paragraph) >= builtin.MIN_LETTERS_OF_A_COPY)
    assert all(before != after for before, after in pairwise(long))


def test_a_caller_may_change_the_list():
    builtin_documents().clear()
    assert builtin_documents()


def test_topics_are_sorted_and_cut_at_their_headings(library):
    topics = {
        "b": f"Names\n*****\n\n{LONG.format('b')}\n\nInner names\n===========\n\n{LONG.format('c')}",
        "a": f"{LONG.format('a')}\n\n   --- no heading\n",
    }
    assert library(topics) == [
        f"{LONG.format('a')}\n\n   --- no heading",
        f"Names\n*****\n\n{LONG.format('b')}",
        f"Inner names\n===========\n\n{LONG.format('c')}",
    ]


def test_a_module_is_one_document_in_the_order_of_its_source(library):
    source = '''"""The module, whose words count."""
x = lambda: "no docstring"
if x:
    def f():
        """The function."""
else:
    class A:
        """The class."""
        async def g(self):
            """The method."""
try:
    pass
except Exception:
    def h():
        "A \\d handler."
'''
    expected = "The module, whose words count.\n\nThe function.\n\nThe class.\n\nThe method.\n\nA \\d handler."
    assert library({}, module=source) == [expected]


def test_what_was_there_before_is_left_out(library):
    first, second, third = map(LONG.format, ("one", "two", "three"))
    documents = library(
        {"a": first},
        b=f'"""{second}\n\nSee also:\n\n{first}\n\nSee also:"""',
        c=f'"""See also:\n\n{second.upper()}"""',
        d=f'"""See also:\n\n{third}"""',
    )
    assert documents == [first, f"{second}\n\nSee also:\n\nSee also:", f"See also:\n\n{third}"]


def test_modules_come_in_the_order_of_their_paths(library):
    names = ("c", "b/a", "a")
    assert library({}, **{name: f'"""{LONG.format(name)}"""' for name in names}) == [*map(LONG.format, sorted(names))]


def test_tests_builds_and_packages_of_others_are_left_out(library):
    others = ("test/a", "x/tests/a", "idlelib/idle_test/a", "site-packages/a", "config-3.11-linux/a")
    documents = library({}, **{name: f'"""{LONG.format(name)}"""' for name in (*others, "x/a")})
    assert documents == [LONG.format("x/a")]


def test_a_module_that_does_not_parse_holds_nothing(library):
    broken = '"""Old, and long enough to count as a paragraph."""\nprint "hello"\n'
    assert library({"a": LONG}, module=broken) == [LONG]


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="needs the sources of Python's standard library"):
        builtin_files()
