"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What a process that was killed leaves behind ends so.
UNFINISHED = ".unfinished"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, hand it to the disk and move it there; text is UTF-8."""
    with moved_when_whole(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def moved_when_whole(path: Path) -> Iterator[Path]:
    """Where to write a file beside its place; it is handed to the disk and moved there, or removed after a failure."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):  # the first failure is the one to tell
            unfinished.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Hand what was written to a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
