"""A real browser, where there is one, and pages opened in it that may complain of nothing and ask for nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, TABLET, PHONE = (1440, 900), (820, 1100), (390, 844)


def why_unavailable() -> str | None:
    """Why no page can be opened on this machine; None where it can."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    return None if _executable() else "no chromium on this machine"


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window; outside of tests that need one, no event loop of playwright's is running."""
    from playwright.sync_api import sync_playwright

    # Chromium refuses its sandbox to root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_executable(), args=arguments)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page.

    Args:
        page: playwright's Page; untyped, for to it all that a test looks for may be missing.
        complaints: errors, and whatever was written to the console.
        requests: addresses that it asked for, its own first.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def visit(browser: Browser, path: Path, size: tuple[int, int] = WIDE, **settings: Any) -> Iterator[Visit]:
    """Opens a file in a window of its own. At the end it must have complained of nothing, and asked for no more.

    Args:
        browser: as `launched` gives it.
        path: the file.
        size: width and height of the window, pixels.
        settings: of playwright's `new_context`, such as `color_scheme`.
    """
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    try:
        visited = Visit(context.new_page())
        visited.page.set_default_timeout(10_000)
        visited.page.on("console", lambda message: visited.complaints.append(f"{message.type}: {message.text}"))
        visited.page.on("pageerror", lambda error: visited.complaints.append(str(error)))
        visited.page.on("request", lambda request: visited.requests.append(request.url))
        visited.page.goto(path.as_uri())
        yield visited
        assert visited.complaints == []
        assert visited.requests == [path.as_uri()]
    finally:
        context.close()


def _executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)
