"""Builds a cache folder, in stages that a later process picks up if this one ends before it is done.

An unfinished folder lies beside its place under a fixed name; a lock keeps other processes away from it. Its manifest
lists the files of the stages that are finished; the training tokens, which can take hours, have a journal besides.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from moxe.data.config import DataConfig
from moxe.data.console import reason, say
from moxe.data.encoding import document_hash
from moxe.data.holdout import hold_out
from moxe.data.journal import TokenJournal
from moxe.data.sources import BUILTIN, Source, Sources, find_source, read_places
from moxe.data.tokenizer import load_tokenizer, train_tokenizer
from moxe.data.tokens import cut, encoding_of, text_batches, tokenize_documents, write_token_documents
from moxe.data.workers import encode_batches
from moxe.errors import PassingError, UserError
from moxe.files import sync
from moxe.manifest import MANIFEST, DamagedError, verify_manifest, write_manifest

# Documents that are held out of a hub data set where the recipe does not say how many.
HUB_VALIDATION_DOCUMENTS = 1000
# A tokenizer is trained on the first so many characters of the training documents; its merges change little beyond.
TOKENIZER_TRAINING_CHARACTERS = 100_000_000

TEXTS = "validation.jsonl"
# The version that tokens of an unfinished folder were made with; another one's are not mixed with them.
TOKENIZERS_VERSION = "tokenizers-version"


def find_sources(config: DataConfig) -> Sources:
    """The sources of a configuration; `subset` belongs to the data set of `source` alone."""
    training = find_source(config.source, config.subset)
    if config.validation_source is None:
        return Sources(training, None)
    if config.validation_source == config.source:
        return Sources(training, training)
    return Sources(training, find_source(config.validation_source))


def is_streamed(config: DataConfig, sources: Sources) -> bool:
    """Whether training reads the hub as it goes; with `max_tokens` the tokens are few enough to keep."""
    return sources.training.is_hub and config.max_tokens is None


def make_folder(
    config: DataConfig, sources: Sources, tokenizer: PreTrainedTokenizerFast | None, folder: Path, progress: bool
) -> bool:
    """Makes a cache folder, unless it is there and every file in it is as it was written.

    Args:
        config: decides what the folder holds.
        sources: of the configuration, with the revisions that the folder's name stands for.
        tokenizer: None: one is trained.
        folder: the place.
        progress: draws bars on the standard error output.

    Returns:
        Whether it was there.

    Raises:
        UserError: for data that cannot be read, or a place that cannot be written; what was made is removed.
        PassingError: for a failure that may pass; what was made is kept, and the next call goes on from there.
    """
    try:
        if _is_whole(config, sources, folder):
            return True
    except DamagedError:
        pass  # whoever has the lock looks again
    with _alone(config, folder):
        try:
            if _is_whole(config, sources, folder):  # another process was first
                return True
        except DamagedError as error:
            say(f"Tokenised data are damaged and are made again: {error}.")
            shutil.rmtree(folder)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            _begin(unfinished)
            with _progress_bars(progress) as bars:
                names = _write(config, sources, tokenizer, unfinished, bars)
            _remove_others(unfinished, names)
            os.replace(unfinished, folder)
            sync(folder.parent)
        except PassingError:
            raise
        except UserError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        except OSError as error:
            raise PassingError(
                f"data.cache_dir {config.cache_dir!r} cannot be written: {error.strerror or error}; once it can, the "
                "same command goes on from there."
            ) from error
    return False


def read_validation_texts(folder: Path) -> list[str]:
    """The held-out documents of a cache folder."""
    with (folder / TEXTS).open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _begin(unfinished: Path) -> None:
    """Makes the unfinished folder; one that another version of the tokenizers library began is emptied first."""
    version = unfinished / TOKENIZERS_VERSION
    if unfinished.exists() and not (version.is_file() and version.read_text() == tokenizers.__version__):
        shutil.rmtree(unfinished)
    unfinished.mkdir(exist_ok=True)
    version.write_text(tokenizers.__version__)
    sync(unfinished.parent)


def _vouch(folder: Path, names: list[str]) -> None:
    """Says that these files are finished, once the names in their folders have reached the disk, too."""
    for parent in {(folder / name).parent for name in names}:
        sync(parent)
    write_manifest(folder, names)


def _is_whole(config: DataConfig, sources: Sources, folder: Path) -> bool:
    """Whether the folder is there. Raises DamagedError if a file of it is not what was written."""
    if not folder.exists():
        return False
    names = [TEXTS, *_documents("validation")]
    if config.tokenizer == "train":
        names.append("tokenizer/tokenizer.json")
    if not is_streamed(config, sources):
        names += _documents("train")
    if not verify_manifest(folder, required=names):
        raise DamagedError(f"{folder} has no {MANIFEST}")
    return True


def _documents(part: str) -> list[str]:
    return [f"{part}/{name}" for name in ("tokens.bin", "offsets.npy", "documents.json")]


@contextmanager
def _alone(config: DataConfig, folder: Path) -> Iterator[None]:
    """Waits until no other process builds the folder, and keeps them waiting."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            say("Another process tokenises the same data; waiting for it.")
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        error = error if isinstance(error, OSError) else OSError(f"it has no file locks ({error})")
        raise UserError(f"data.cache_dir {config.cache_dir!r} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()


def _write(
    config: DataConfig, sources: Sources, tokenizer: PreTrainedTokenizerFast | None, folder: Path, bars: Progress
) -> list[str]:
    """Takes the stages that are not finished; the names of all files that belong to the folder."""
    names = [TEXTS]
    if _is_finished(folder, names):
        texts = read_validation_texts(folder)
    else:
        texts = _validation_texts(config, sources, bars)
        with (folder / TEXTS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        _vouch(folder, names)

    if tokenizer is None:
        if not _is_finished(folder, ["tokenizer/tokenizer.json"], ["tokenizer/*"]):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            documents = _without(texts, _read(config, sources.training, bars, "Training the tokenizer"))
            trained = train_tokenizer(_first(documents, TOKENIZER_TRAINING_CHARACTERS), config.vocab_size)
            try:
                trained.save_pretrained(folder / "tokenizer")
            except OSError:
                raise
            except Exception as error:  # tokenizers raises plain Exception for a disk that is full
                raise OSError(reason(error)) from error
            _vouch(folder, [*names, *_files_in(folder, "tokenizer")])
        names += _files_in(folder, "tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer")

    names += _documents("validation")
    if not _is_finished(folder, _documents("validation")):
        shutil.rmtree(folder / "validation", ignore_errors=True)
        write_token_documents(tokenize_documents(texts, tokenizer), folder / "validation", len(tokenizer))
        _vouch(folder, names)

    if not is_streamed(config, sources):
        names += _documents("train")
        if not _is_finished(folder, _documents("train")):
            _write_training_tokens(config, sources, tokenizer, texts, folder / "train", bars)
            _vouch(folder, names)
    return names


def _is_finished(folder: Path, names: list[str], patterns: list[str] | None = None) -> bool:
    """Whether an earlier process finished these files, and they are as it wrote them."""
    try:
        return verify_manifest(folder, patterns or names, required=names)
    except DamagedError:
        return False


def _files_in(folder: Path, name: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / name).iterdir())


def _remove_others(folder: Path, names: Iterable[str]) -> None:
    """Removes journals and what a process that was killed left of temporary files."""
    kept = {folder / name for name in names} | {folder / MANIFEST}
    for path in list(folder.rglob("*")):
        if path.is_file() and path not in kept:
            path.unlink()


def _write_training_tokens(
    config: DataConfig,
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[str],
    folder: Path,
    bars: Progress,
) -> None:
    with TokenJournal(folder, len(tokenizer)) as journal:
        limit = config.max_tokens
        label = "Tokenising"
        if journal.place is not None:
            say(f"Tokenising was interrupted after {journal.num_tokens:,} tokens and goes on from there.")
            label = "Tokenising, picked up"
        bar = None if limit is None else bars.add_task(label, total=limit, completed=journal.num_tokens)
        if limit is None or journal.num_tokens < limit:
            encoding = encoding_of(tokenizer, map(document_hash, held_out))
            label = label if limit is None else "Reading"
            batches = text_batches(_read_places(config, sources.training, bars, label, place=journal.place))
            # Closed at once if this is interrupted: a traceback would keep the generator, and it its workers.
            with closing(encode_batches(batches, encoding, config.num_workers)) as results:
                for batch, encoded in results:
                    if limit is not None:
                        encoded = cut(encoded, limit - journal.num_tokens)
                    journal.append(encoded, batch.end)
                    if bar is not None:
                        bars.advance(bar, len(encoded[0]))
                    if journal.num_tokens == limit:
                        break
        if journal.num_documents == 0:
            raise UserError(
                f"No document of the training source {config.source!r} is left: all are in the validation data "
                f"({len(held_out)} documents)."
            )
        journal.finish()


def _progress_bars(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def _validation_texts(config: DataConfig, sources: Sources, bars: Progress) -> list[str]:
    source = sources.to_validate
    if sources.validation is None and not source.is_hub:
        read = partial(_read, config, source, bars, "Reading")
        return hold_out(read, fraction=config.validation_fraction, count=config.validation_documents)
    limit = config.validation_documents or (HUB_VALIDATION_DOCUMENTS if source.is_hub else None)
    return list(islice(_read(config, source, bars, "Reading validation data", config.validation_split), limit))


def _without(held_out: Iterable[str], documents: Iterable[str]) -> Iterator[str]:
    """The documents that are no copies of held-out ones."""
    hashes = set(map(document_hash, held_out))
    return (text for text in documents if document_hash(text) not in hashes)


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents, until they have so many characters."""
    for text in documents:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _read(config: DataConfig, source: Source, bars: Progress, label: str, split: str | None = None) -> Iterator[str]:
    return (text for text, _ in _read_places(config, source, bars, label, split))


def _read_places(
    config: DataConfig, source: Source, bars: Progress, label: str, split: str | None = None, place: Any = None
) -> Iterator[tuple[str, Any]]:
    """A source from a place on, with a bar that counts bytes of local files; of a hub data set `split`, or else the one
    that is trained on."""
    files = source.files if source.name != BUILTIN else None
    try:
        size = sum(path.stat().st_size for path in files) if files else None
    except OSError as error:
        raise PassingError(f"The data file {error.filename!r} cannot be read: {error.strerror or error}.") from error
    bar = bars.add_task(label, total=size)
    yield from read_places(
        source,
        text_field=config.text_field,
        document_separator=config.document_separator,
        split=split or config.split,
        advance=partial(bars.advance, bar),
        place=place,
    )
    bars.update(bar, total=size or 1, completed=size or 1)
