"""The SHA-256 of each file of a folder, kept beside them, so that damage is found before anything is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from moxe.errors import PassingError, UserError, shown
from moxe.files import sync, write_whole

MANIFEST = "manifest.json"
_VERSION = 1


class DamagedError(UserError):
    """A folder is not what its manifest says; the message names the file."""


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write `manifest.json`: size and SHA-256 of files of `folder`, which must not change any more.

    Every file and the folder are handed to the disk first (fsync), so that what the manifest vouches for outlives a
    power cut.

    Args:
        folder: where the files lie.
        names: of the files, relative to the folder; None: all files in it and its sub-folders.
    """
    if names is None:
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _describe(folder / name) for name in sorted(set(names) - {MANIFEST})}
    for inner in {(folder / name).parent for name in files} - {folder}:
        sync(inner)
    write_whole(folder / MANIFEST, json.dumps({"version": _VERSION, "files": files}, indent=2) + "\n")


def verify_manifest(folder: Path, patterns: Iterable[str] = ("*",), required: Iterable[str] = ()) -> bool:
    """Whether `folder` has a manifest; if it has, every file it lists is as it was written.

    Args:
        folder: where the files and the manifest lie.
        patterns: shell patterns of the names to read and compare; the others are not looked at.
        required: names that the manifest must list.

    Raises:
        DamagedError: a file is missing, shorter, longer or different, lies outside the folder, or is required and not
            listed; or the manifest is not one.
        PassingError: a file cannot be read, for instance because the disk fails or too many are open.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    files = _parse(text, path)
    for name in required:
        if name not in files:
            raise DamagedError(f"{path} does not list {name}")
    for name, described in files.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            _compare(folder, name, described)
    return True


def require_unchanged(folder: Path, patterns: Iterable[str], required: Iterable[str] = ()) -> None:
    """Refuse a model folder whose files are not those of its manifest, and say what to do if the change was meant.

    Raises:
        DamagedError: see `verify_manifest`.
    """
    try:
        verify_manifest(folder, patterns, required)
    except DamagedError as error:
        raise DamagedError(f"{error}; if the change was meant, remove {folder / MANIFEST}") from None


def _describe(path: Path) -> dict[str, Any]:
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _parse(text: str, path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError(f"{path} is no JSON") from None
    if not isinstance(content, dict) or not isinstance(files := content.get("files"), dict):
        raise DamagedError(f"{path} is no manifest")
    if content.get("version") != _VERSION:
        raise DamagedError(f"{path} has version {shown(content.get('version'))}; this moxe reads version {_VERSION}")
    if not all(isinstance(described, dict) for described in files.values()):
        raise DamagedError(f"{path} is no manifest")
    return files


def _compare(folder: Path, name: str, described: dict[str, Any]) -> None:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DamagedError(f"{folder / MANIFEST} lists {name!r}, which leaves its folder")
    try:
        size = path.stat().st_size
        if size != described.get("bytes"):
            raise DamagedError(f"{path} has {size} bytes, but {shown(described.get('bytes'))} were written")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is missing") from None
    except IsADirectoryError:
        raise DamagedError(f"{path} is a folder") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:  # a name that no file can have
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{folder / MANIFEST} lists {name!r}: {error}") from None
    if digest != described.get("sha256"):
        raise DamagedError(f"{path} is not what was written: its SHA-256 is {digest}")


def _unreadable(path: Path, error: OSError) -> PassingError:
    return PassingError(f"{path} cannot be read: {error.strerror or error}")
