"""The page as a file: data and code apart, nothing asked of anybody, libraries that are those of their packages."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import moxe.observability.explorer
from moxe.observability.explorer.page import render_page

VENDOR = Path(moxe.observability.explorer.__file__).parent / "vendor"
HOSTILE = '</script><img src=x onerror="window.pwned=1"><!-- & \u2028\u2029 " \\ \x01'


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data


def hostile_model() -> dict[str, Any]:
    return {"name": HOSTILE, "pieces": [HOSTILE], "vocabulary": {"1": HOSTILE}}


@pytest.fixture(scope="module")
def page() -> str:
    return render_page([hostile_model()], text_name=HOSTILE)


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def test_texts_come_back_as_they_were_and_add_no_element(elements: Elements):
    assert json.loads(elements.scripts[0]) == {"text_name": HOSTILE, "models": [hostile_model()]}
    assert "img" not in [tag for tag, _ in elements.found]
    harmless = Elements(render_page([{**hostile_model(), "name": "a", "pieces": ["a"]}], text_name="a"))
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in harmless.found]


def test_the_data_holds_no_letter_that_could_end_its_element(elements: Elements):
    assert not re.search("[<>&\u2028\u2029]", elements.scripts[0])


def test_the_page_names_no_file_or_address(elements: Elements):
    for tag, attributes in elements.found:
        assert not {"src", "href", "srcset", "action", "data", "poster"} & attributes.keys(), (tag, attributes)
    assert "@import" not in (text := render_page([hostile_model()], text_name="a"))
    assert "url(" not in text[: text.index("</style>")]


def test_its_policy_lets_nothing_run_but_its_own_scripts(elements: Elements):
    (policy,) = [a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.keys() == {"default-src", "base-uri", "form-action", "style-src", "script-src"}
    assert {rules[name] for name in ("default-src", "base-uri", "form-action")} == {"'none'"}
    kinds = [attributes.get("type") for tag, attributes in elements.found if tag == "script"]
    assert kinds == ["application/json", None, None, None]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in elements.scripts[1:]]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]


def test_the_libraries_carry_their_licences(elements: Elements):
    for script in elements.scripts[1:3]:
        assert "Permission to use, copy, modify, and/or distribute this software" in script


def test_the_libraries_are_the_files_whose_sums_are_written_down():
    rows = re.findall(r"^\| (\S+) \| .* \| `([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in VENDOR.glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest


def test_the_code_writes_texts_as_texts():
    code = "".join(path.read_text(encoding="utf-8") for path in (VENDOR.parent / "js").glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\.html\(", code)


def test_every_file_of_code_is_in_the_page(page: str):
    for path in (VENDOR.parent / "js").glob("*.js"):
        assert path.read_text(encoding="utf-8") in page


def test_a_number_that_is_not_finite_is_no_page():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_page([{"name": "a", "loss": float("nan")}], text_name="a")
