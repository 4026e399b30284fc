"""Where a run prints: a terminal that is closed, or a reader that has gone, must not end it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import IO, Any

from rich.console import Console


class _Patient:
    """A stream that takes what cannot be written without a word."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_console() -> Console:
    """A console on the standard output."""
    stream: Any = _Patient(sys.stdout)
    return Console(file=stream)
