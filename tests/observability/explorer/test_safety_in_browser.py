"""The page runs nothing but its own code, asks for nothing, and shows every text as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moxe.experiments.exploration import explore
from moxe.observability.explorer.page import write_page
from tests.browser import Visit
from tests.models.tiny import tiny_model
from tests.observability.explorer.conftest import CORPUS, Made, Open

HOSTILE = (
    '</script><img src=x onerror="window.pwned=1"><script>window.pwned=1</script><svg onload="window.pwned=1">'
    "<!-- ' \" ` ${window.pwned=1} &amp; &lt; \\u003c \u2028\u2029 \x01\x7f \N{GRINNING FACE} "
    "\N{ARABIC LETTER SEEN}\N{ARABIC LETTER LAM} \N{RIGHT-TO-LEFT OVERRIDE}abc\N{POP DIRECTIONAL FORMATTING} a\u0301"
)
# Resolves to the directive that stopped the attempt, which is made later, as code of the page: what comes from outside,
# as this does, may do more.
ATTEMPT = """new Promise((resolve) => {
  const add = (name, settings) => {
    const made = Object.assign(document.createElement(name), settings);
    document.body.append(made);
    return made;
  };
  document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective), { once: true });
  setTimeout(() => { %s });
  setTimeout(() => resolve("nothing was stopped"), 5000);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("offline", [False, True])
def test_the_page_complains_of_nothing_and_asks_for_nothing(visiting: Open, made: Made, scheme: str, offline: bool):
    with visiting(made.path, color_scheme=scheme, offline=offline) as visited:
        page = visited.page
        for measure in page.locator("#measure option").evaluate_all("all => all.map(one => one.value)"):
            page.locator("#measure").select_option(measure)
        page.locator("[data-token]").nth(4).click()
        page.locator(".card button").first.click()
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        assert page.locator("svg").count() > 8


@pytest.mark.parametrize(
    ("directive", "attempt"),
    [
        ("script-src-elem", "add('script', {textContent: 'window.pwned = 1'})"),
        ("script-src-elem", "add('script', {src: 'https://example.invalid/code.js'})"),
        ("script-src-attr", "add('div', {}).setAttribute('onclick', 'window.pwned = 1')"),
        ("img-src", "add('img', {src: 'https://example.invalid/picture.png'})"),
        ("img-src", "add('img', {src: 'data:image/gif;base64,R0lGODlhAQABAAAAACw='})"),
        ("style-src-elem", "add('link', {rel: 'stylesheet', href: 'https://example.invalid/style.css'})"),
        ("frame-src", "add('iframe', {src: 'https://example.invalid/'})"),
        ("connect-src", "fetch('https://example.invalid/').catch(() => null)"),
        ("script-src", "try { new Function('window.pwned = 1')() } catch {}"),
    ],
)
def test_the_policy_of_the_page_stops_what_it_does_not_do_itself(attempted: Visit, directive: str, attempt: str):
    assert attempted.page.evaluate(ATTEMPT.replace("%s", attempt)) == directive
    assert attempted.page.evaluate("window.pwned") is None


@pytest.fixture(scope="module")
def attempted(visiting: Open, made: Made) -> Iterator[Visit]:
    """The page, open for all attempts."""
    with visiting(made.path) as visited:
        yield visited
        visited.complaints.clear()  # the browser tells of what it stopped, as of a request too
        del visited.requests[1:]


@pytest.fixture(scope="module")
def hostile_page(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose every text is hostile: the text itself, the names, the corpus, the vocabulary and the settings."""
    exploration = explore(
        tiny_model(vocab_size=300), HOSTILE, tokenizer, name=HOSTILE, corpus=[HOSTILE] * 20, corpus_name=HOSTILE
    )
    vocabulary = {token: f"{HOSTILE}{token}" for token in exploration.vocabulary}
    other = explore(tiny_model(vocab_size=300), HOSTILE, tokenizer, name="other", corpus=CORPUS)
    other.config.expert_kind = HOSTILE
    path = tmp_path_factory.mktemp("hostile") / "page.html"
    write_page([dataclasses.replace(exploration, vocabulary=vocabulary), other], path, text_name=HOSTILE)
    return path


def test_hostile_texts_are_shown_as_they_are_and_run_nothing(visiting: Open, hostile_page: Path):
    with visiting(hostile_page) as visited:
        page = visited.page
        shown = page.locator('[data-part="text"]').first.locator("[data-token]").all_text_contents()
        assert "".join(piece for piece in shown if piece != "·") == HOSTILE
        for token in (0, 10, len(shown) - 1):
            page.locator("[data-token]").nth(token).focus()
        page.locator(".card button").first.click()
        assert page.locator("h2").first.text_content() == HOSTILE
        assert page.locator("head title").text_content() == f"{HOSTILE} and other: where the tokens go"
        assert HOSTILE in page.locator('[data-part="experts-note"]').first.text_content()
        assert HOSTILE in page.locator('[data-part="facts"]').first.text_content()
        assert HOSTILE in page.locator('[data-part="differences"]').last.text_content()
        names = page.locator(".token .piece").first.evaluate(
            "() => [...document.querySelectorAll('.token table .piece')].map(one => one.textContent)"
        )
        assert sum(name.startswith(HOSTILE) for name in names) == 5
        assert_nothing_came_of_it(page)


def assert_nothing_came_of_it(page: Any) -> None:
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, object, embed, link, [onerror], [onload], [onclick]").count() == 0
    assert page.locator("script").count() == 4  # the data, two libraries, the code
    inside = page.locator("[data-token], .piece, h2, .model .note, .facts dd").evaluate_all(
        "all => all.flatMap(one => [...one.children].map(child => child.tagName))"
    )
    assert inside == []
