"""results.json: everything measured, in an order that never changes, without numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moxe.errors import UserError
from moxe.files import write_whole

FORMAT = 1
_NOT_FINITE = "not_finite"


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the results, keys sorted; NaN and infinities become null and are listed by place under "not_finite"."""
    found: list[dict[str, Any]] = []
    plain = _plain({key: value for key, value in results.items() if key != _NOT_FINITE}, [], found)
    content = json.dumps({**plain, _NOT_FINITE: found}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_whole(path, content + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Read what `write_results` wrote, with its NaN and infinities.

    Raises:
        UserError: if there is no such file, it is no JSON, or of another format.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} holds no results of format {FORMAT}")
    for entry in results.pop(_NOT_FINITE, []):
        *way, last = entry["path"]
        place = results
        for step in way:
            place = place[step]
        place[last] = float(entry["value"])
    return results


def _plain(value: Any, way: list[str | int], found: list[dict[str, Any]]) -> Any:
    """The value in JSON's types; what is not finite goes to `found` with the way to it."""
    if isinstance(value, dict):
        return {str(key): _plain(inner, [*way, str(key)], found) for key, inner in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner, [*way, index], found) for index, inner in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        found.append({"path": way, "value": str(value)})
        return None
    return value
