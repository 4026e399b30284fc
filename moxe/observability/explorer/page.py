"""One HTML file that shows explorations, and asks for nothing else: no server, no network, no further file.

Data and code are apart: the numbers and texts are one JSON object in an element that no browser runs, and the code
writes texts as texts. The page's own policy lets the browser run nothing but the scripts written here, and fetch
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from moxe.files import write_whole
from moxe.observability.explorer.exploration import Exploration

_FOLDER = Path(__file__).parent
# In the order in which they use each other.
_CODE = ("elements", "measures", "text", "token", "load", "experts", "theory", "page")
# Escapes inside strings of JSON; the characters occur nowhere else in it that would need them.
_INERT = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"}


def write_page(explorations: Sequence[Exploration], path: Path, *, text_name: str) -> None:
    """Write the page of one model, or of two side by side.

    Args:
        explorations: of the same text.
        path: the file; its folder is made if it is not there.
        text_name: what the text is, for a reader of the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_page([one.to_dict() for one in explorations], text_name=text_name)
    write_whole(path, page.encode("utf-8", "backslashreplace"))  # the name of a folder may be any bytes


def render_page(models: Sequence[dict[str, Any]], *, text_name: str) -> str:
    """The page's HTML for the plain numbers of explorations."""
    data = json.dumps({"text_name": text_name, "models": list(models)}, ensure_ascii=False, allow_nan=False)
    scripts = [_library("d3"), _library("plot"), _code()]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_read("page.html.jinja")).render(
        title=" and ".join(model["name"] for model in models),
        style=_read("page.css"),
        data=data.translate(_INERT),
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
    )


def _library(name: str) -> str:
    """A library with its licence, which asks to be kept beside it."""
    licence = _read(f"vendor/{name}.LICENSE").strip()
    return f"\n/* {name}\n\n{licence}\n*/\n{_read(f'vendor/{name}.min.js').strip()}\n"


def _code() -> str:
    parts = [_read(f"js/{name}.js") for name in _CODE]
    return "\n".join(["\n(() => {", '"use strict";', *parts, "})();\n"])


def _hash(script: str) -> str:
    """As a content security policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
