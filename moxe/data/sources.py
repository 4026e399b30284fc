"""Where text comes from: the built-in corpus, local files, the Hugging Face hub. Everything is read lazily."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moxe.data.builtin import builtin_documents, builtin_files
from moxe.data.console import reason
from moxe.data.hub import checked_text, hub_documents, hub_revision
from moxe.errors import PassingError, UserError

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS_OF_SOURCE = (
    f'"{BUILTIN}", a file, folder or glob of {", ".join(SUFFIXES)}, or the name "owner/name" of a data set on the '
    "Hugging Face hub"
)

# Called with the number of bytes of the source that were read since the last call; drives progress bars.
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """A source that was looked up once, so that all who read it read the same.

    Args:
        name: as in the recipe.
        files: that it is read from, sorted; None: it is a data set on the hub.
        subset: configuration name of a hub data set.
        revision: of a hub data set; None: the one that the hub gives when reading begins.
    """

    name: str
    files: list[Path] | None
    subset: str | None = None
    revision: str | None = None

    @property
    def is_hub(self) -> bool:
        return self.files is None

    def pinned(self) -> "Source":
        """With the revision that the hub gives now, if it is on the hub."""
        return replace(self, revision=hub_revision(self.name, self.subset)) if self.is_hub else self


@dataclass(frozen=True)
class Sources:
    """What to train on and what to validate on; validation None: a part of the training source is held out."""

    training: Source
    validation: Source | None

    @property
    def to_validate(self) -> Source:
        return self.validation or self.training

    def pinned(self) -> "Sources":
        """With revisions; a hub data set that is both sources is asked for once."""
        training = self.training.pinned()
        if self.validation is None or self.validation == self.training:
            return Sources(training, self.validation and training)
        return Sources(training, self.validation.pinned())


def find_source(name: str, subset: str | None = None) -> Source:
    """Looks a source up here; the hub is not asked. Raises as `find_files`."""
    return Source(name, find_files(name), subset)


def read_documents(
    source: str,
    *,
    text_field: str,
    document_separator: str,
    subset: str | None = None,
    split: str = "train",
    advance: Advance | None = None,
) -> Iterator[str]:
    """The documents of a source, one by one, in a fixed order; documents of white space alone are left out.

    Args:
        source: "builtin"; a file, folder (searched with its sub-folders) or glob of .txt, .jsonl or .parquet files,
            read in the order of their paths; or the name "owner/name" of a data set on the hub, which is streamed.
        text_field: field (.jsonl) or column (.parquet, hub) that holds the text.
        document_separator: line that ends a document in a .txt file, surrounding white space aside; the end of the
            file ends one too, so a .txt file without such a line is one document. "" cuts at blank lines.
        subset, split: configuration name and split of a hub data set.
        advance: called with the number of bytes read from local files since the last call.

    Raises:
        UserError: for a source that does not exist or holds no text, at once; for one that cannot be read as text,
            when reading comes to it, with the file and the byte, line or row.
    """
    places = read_places(
        find_source(source, subset),
        text_field=text_field,
        document_separator=document_separator,
        split=split,
        advance=advance,
    )
    return (text for text, _ in places)


def read_places(
    source: Source,
    *,
    text_field: str,
    document_separator: str,
    split: str = "train",
    advance: Advance | None = None,
    place: Any = None,
) -> Iterator[tuple[str, Any]]:
    """As `read_documents`, each document with the place in the source after it, from which reading can go on.

    Args:
        place: where to go on, as it came with a document of the same source; JSON can say it. None: the beginning.
            Local files are read again up to there.
    """
    if source.files is None:
        return hub_documents(source.name, source.subset, split, text_field, revision=source.revision, place=place)
    if source.name == BUILTIN:
        documents: Iterable[str] = builtin_documents()
    else:
        documents = chain.from_iterable(
            _read_file(file, text_field, document_separator, advance) for file in source.files
        )
    numbered = ((text, number) for number, text in enumerate(documents, start=1))
    return islice(numbered, place or 0, None)


def find_files(source: str) -> list[Path] | None:
    """The files a source is read from, sorted; None: it is the name of a data set on the hub.

    Raises:
        UserError: if the source is neither, or its folder or glob has no file of a kind that can be read.
    """
    if source == BUILTIN:
        return builtin_files()
    path = Path(os.path.expanduser(source))  # Path.expanduser fails for a user that is not there
    try:
        if path.is_file():
            return _readable([path], f"The data file {source!r}")
        if path.is_dir():
            return _readable(_visible_files(path), f"The folder {source!r}")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"The data source {source!r} cannot be read: {error.strerror}.") from error
    if glob.has_magic(source):
        matches = map(Path, glob.glob(str(path), recursive=True))
        return _readable([match for match in matches if match.is_file()], f"The pattern {source!r}")
    if path.suffix in SUFFIXES or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        raise UserError(f"The data source {source!r} does not exist; give {KINDS_OF_SOURCE}.")
    return None


def _visible_files(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders, hidden ones aside.

    A symbolic link out of the folder is refused: whoever filled the folder may not be who reads it, and could make any
    file of the reader's part of the training data.
    """
    found = []
    root = os.path.realpath(folder)
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        is_read = path.suffix in SUFFIXES or path.is_dir()
        if is_read and path.is_symlink() and not _lies_in(target := os.path.realpath(path), root):
            raise UserError(
                f"The symbolic link {str(path)!r} leads out of the data folder {str(folder)!r}, to {target!r}; give "
                "that file or folder, or a glob, as the source instead."
            )
        if path.is_file():
            found.append(path)
    return found


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _readable(files: list[Path], what: str) -> list[Path]:
    kept = sorted(path for path in files if path.suffix in SUFFIXES)
    if not kept:
        raise UserError(f"{what} holds no file that can be read, which end with {', '.join(SUFFIXES)}.")
    return kept


def _read_file(path: Path, text_field: str, document_separator: str, advance: Advance | None) -> Iterator[str]:
    """The documents of one local file; refuses a file that has none."""
    if path.suffix == ".txt":
        documents = _read_txt(path, document_separator)
    elif path.suffix == ".jsonl":
        documents = _read_jsonl(path, text_field)
    else:
        documents = _read_parquet(path, text_field)
    any_text = False
    try:
        for document, size in documents:
            if document.strip():
                any_text = True
                yield document
            if advance is not None:
                advance(size)
    except OSError as error:
        raise PassingError(f"The data file {str(path)!r} cannot be read: {error.strerror or error}.") from error
    if not any_text:
        raise UserError(f"The data file {str(path)!r} is empty: it holds no text.")


def _read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of a UTF-8 file without their line break, each with its size in bytes."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"The data file {str(path)!r} is no valid UTF-8: byte {line[error.start]:#04x} at offset "
                    f"{start + error.start}; convert it to UTF-8 first."
                ) from error
            if start == 0:
                text = text.removeprefix("\ufeff")  # byte order mark
            start += len(line)
            yield text.removesuffix("\n").removesuffix("\r"), len(line)


def _read_txt(path: Path, document_separator: str) -> Iterator[tuple[str, int]]:
    """The documents of a text file and the bytes they take, blank lines around a document removed."""
    lines: list[str] = []
    size = 0
    for line, line_size in _read_lines(path):
        size += line_size
        if line.strip() == document_separator.strip():
            yield "\n".join(lines).strip("\n"), size
            lines, size = [], 0
        else:
            lines.append(line)
    yield "\n".join(lines).strip("\n"), size


def _read_jsonl(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The texts of a file with one JSON object a line, and the bytes of each line."""
    for number, (line, size) in enumerate(_read_lines(path), start=1):
        where = f"Line {number} of {str(path)!r}"
        if not line.strip():
            yield "", size
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object but a {type(row).__name__}.")
        if text_field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where} has no field {text_field!r}; its fields: {fields}.")
        yield checked_text(row[text_field], f"{where} has in field {text_field!r}"), size


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, int]]:
    """The texts of a column, and each text's share of the file's bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                columns = ", ".join(map(repr, file.schema_arrow.names))
                raise UserError(f"The data file {str(path)!r} has no column {column!r}; its columns: {columns}.")
            rows = file.metadata.num_rows
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    text = checked_text(value, f"Row {number} of {str(path)!r} has in column {column!r}")
                    yield text, size * number // rows - size * (number - 1) // rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; for contents that it cannot decompress or parse, pyarrow gives no number
        raise UserError(f"The data file {str(path)!r} is no parquet file that can be read: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The column {column!r} of {str(path)!r} is no valid UTF-8: {error}.") from error
