"""From the `data` section of a recipe to rows: read, hold out, train or load a tokenizer, tokenise once, pack.

Tokenised data is kept in `<cache_dir>/<key>/`, where the key is a hash of everything that decides it: the contents of
the files (the revision of a hub data set), the tokenizer, the settings of reading and holding out. A change of any of
these is another folder; a run that needs the same tokens again maps them at once. Folder by folder:

    train/              the training documents as tokens (not for a source that is streamed during training)
    validation/         the held-out documents as tokens
    validation.jsonl    the held-out documents as text
    tokenizer/          the tokenizer, where it was trained here
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from moxe.data.config import DataConfig
from moxe.data.holdout import document_hash, hold_out
from moxe.data.packing import PackedDataset, PackedStream
from moxe.data.sources import (
    BUILTIN,
    find_files,
    hub_documents,
    is_hub,
    open_hub_dataset,
    open_hub_stream,
    read_documents,
)
from moxe.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from moxe.data.tokens import TokenDocuments, Tokens, cut_at, tokenize_documents, write_token_documents
from moxe.errors import UserError

# Part of every key: raise it when the same settings would give other files than before.
CACHE_VERSION = 1
# Documents that are held out of a hub data set where the recipe does not say how many.
HUB_VALIDATION_DOCUMENTS = 1000
# A tokenizer is trained on the first so many characters of the training documents; its merges change little beyond.
TOKENIZER_TRAINING_CHARACTERS = 100_000_000
# Documents that a streamed data set is shuffled within.
SHUFFLE_BUFFER_DOCUMENTS = 1000


@dataclass(frozen=True)
class CorpusStatistics:
    """What a corpus holds. Tokens count the two that begin and end each document.

    Args:
        source: as in the recipe.
        train_documents, train_tokens: None where the training source is streamed.
        validation_documents, validation_tokens: of the held-out part.
        validation_bytes: of the held-out texts in UTF-8; what bits a byte divide by.
        vocab_size: tokens of the tokenizer.
        seconds: that `prepare` took.
        cached: whether the tokens were there before.
    """

    source: str
    train_documents: int | None
    train_tokens: int | None
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    vocab_size: int
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, rows to validate on, and what they were made with.

    Args:
        train: rows in an order of documents that the seed decides; a stream for a hub data set without `max_tokens`.
        validation: rows of the held-out documents in their own order, the same whatever the seed.
        tokenizer: fast, with bos, eos and padding.
        validation_texts: the held-out documents.
        statistics: sizes and the time it took.
    """

    train: PackedDataset | PackedStream
    validation: PackedDataset
    tokenizer: PreTrainedTokenizerFast
    validation_texts: list[str]
    statistics: CorpusStatistics


def prepare(config: DataConfig, *, seed: int, progress: bool = True) -> Corpus:
    """Reads, splits, tokenises and packs the data of a recipe; what was tokenised before is taken from the cache.

    The held-out part depends on the source and the `validation_*` settings alone, neither on the seed, the tokenizer
    nor `max_tokens`, so the runs of an experiment share it.

    Args:
        config: the `data` section.
        seed: of the order in which training documents are packed.
        progress: draws bars on the standard error output.

    Raises:
        UserError: for a source, file or tokenizer that cannot be read (with the place where it fails), a source too
            small to hold a part out, settings that do not belong to the kind of source.
    """
    start = time.perf_counter()
    _check(config)
    tokenizer = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    folder = Path(config.cache_dir).expanduser() / _key(config, tokenizer)
    cached = folder.is_dir()
    if not cached:
        _build(config, tokenizer, folder, progress)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder / "tokenizer")
    with (folder / "validation.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    packed = {"sequence_length": config.sequence_length, "pad_token_id": tokenizer.pad_token_id}
    validation = PackedDataset(TokenDocuments(folder / "validation"), **packed)
    if _is_streamed(config):
        train, train_documents = PackedStream(partial(_stream_tokens, config, seed, tokenizer, texts), **packed), None
    else:
        train_documents = TokenDocuments(folder / "train")
        train = PackedDataset(train_documents, **packed, seed=seed)
    statistics = CorpusStatistics(
        source=config.source,
        train_documents=None if train_documents is None else len(train_documents),
        train_tokens=None if train_documents is None else train_documents.num_tokens,
        validation_documents=len(texts),
        validation_tokens=validation.documents.num_tokens,
        validation_bytes=sum(len(text.encode()) for text in texts),
        vocab_size=len(tokenizer),
        seconds=time.perf_counter() - start,
        cached=cached,
    )
    return Corpus(train, validation, tokenizer, texts, statistics)


def _is_streamed(config: DataConfig) -> bool:
    """Whether training reads the hub as it goes; with `max_tokens` the tokens are few enough to keep."""
    return is_hub(config.source) and config.max_tokens is None


def _check(config: DataConfig) -> None:
    if config.subset is not None and not is_hub(config.source):
        raise UserError(f"data.subset is {config.subset!r}, but the source {config.source!r} is no hub data set.")
    if config.validation_split is not None and not is_hub(config.validation_source or config.source):
        raise UserError(
            f"data.validation_split is {config.validation_split!r}, but the validation data come from "
            f"{config.validation_source or config.source!r}, which is no hub data set."
        )


def _key(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Names the cache folder; equal where the tokens would be."""
    decides = {
        "version": CACHE_VERSION,
        "source": _content(config.source, config.subset),
        "split": config.split,
        "validation_source": config.validation_source
        and _content(config.validation_source, config.subset if config.validation_source == config.source else None),
        "validation": [config.validation_split, config.validation_documents, config.validation_fraction],
        "reading": [config.text_field, config.document_separator, config.max_tokens],
        "tokenizer": ["train", config.vocab_size] if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]


def _content(source: str, subset: str | None) -> list[str | None]:
    """What a source holds: the kind and hash of each local file, or the revision of a hub data set."""
    files = find_files(source)
    if files is None:
        return [source, subset, open_hub_dataset(source, subset).hash]
    content: list[str | None] = []
    for path in files:
        try:
            with path.open("rb") as file:
                content += [path.suffix, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise UserError(f"The data file {str(path)!r} cannot be read: {error.strerror or error}.") from error
    return content


def _build(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None, folder: Path, progress: bool) -> None:
    """Writes a cache folder beside its place and moves it there whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise UserError(f"data.cache_dir {config.cache_dir!r} cannot be written: {error.strerror or error}.") from error
    try:
        with _progress_bars(progress) as bars:
            _write(config, tokenizer, unfinished, bars)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(config: DataConfig, tokenizer: PreTrainedTokenizerFast | None, folder: Path, bars: Progress) -> None:
    texts = _validation_texts(config, bars)
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    if tokenizer is None:
        documents = _without(texts, _read(config, bars, "Training the tokenizer"))
        tokenizer = train_tokenizer(_first(documents, TOKENIZER_TRAINING_CHARACTERS), config.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
    write_token_documents(tokenize_documents(texts, tokenizer), folder / "validation", len(tokenizer))
    if _is_streamed(config):
        return
    documents = _without(texts, _read(config, bars, "Reading" if config.max_tokens else "Tokenising"))
    tokens = cut_at(tokenize_documents(documents, tokenizer), config.max_tokens)
    if config.max_tokens is not None:
        tokens = _with_bar(tokens, bars, config.max_tokens)
    if len(write_token_documents(tokens, folder / "train", len(tokenizer))) == 0:
        raise UserError(
            f"No document of the training source {config.source!r} is left: all are in the validation data "
            f"({len(texts)} documents)."
        )


def _progress_bars(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def _validation_texts(config: DataConfig, bars: Progress) -> list[str]:
    source = config.validation_source or config.source
    if config.validation_source is None and not is_hub(source):
        read = partial(_read, config, bars, "Reading")
        return hold_out(read, fraction=config.validation_fraction, count=config.validation_documents)
    limit = config.validation_documents or (HUB_VALIDATION_DOCUMENTS if is_hub(source) else None)
    return list(islice(_read(config, bars, "Reading validation data", validation=True), limit))


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


def _read(config: DataConfig, bars: Progress, label: str, validation: bool = False) -> Iterator[str]:
    """One pass over the training source, or the validation source, with a bar that counts bytes of local files."""
    source, subset, split = config.source, config.subset, config.split
    if validation:
        source = config.validation_source or source
        subset = subset if source == config.source else None
        split = config.validation_split or split
    files = None if source == BUILTIN else find_files(source)
    size = sum(path.stat().st_size for path in files) if files else None
    bar = bars.add_task(label, total=size)
    yield from read_documents(
        source,
        text_field=config.text_field,
        document_separator=config.document_separator,
        subset=subset,
        split=split,
        advance=partial(bars.advance, bar),
    )
    bars.update(bar, total=size or 1, completed=size or 1)


def _with_bar(documents: Iterable[Tokens], bars: Progress, max_tokens: int) -> Iterator[Tokens]:
    """The documents, with a bar that counts their tokens, the end that is known where reading stops early."""
    bar = bars.add_task("Tokenising", total=max_tokens)
    for document in documents:
        bars.advance(bar, len(document))
        yield document


def _stream_tokens(
    config: DataConfig, seed: int, tokenizer: PreTrainedTokenizerFast, held_out: Iterable[str], epoch: int
) -> Iterator[Tokens]:
    """The training documents of a pass over a streamed data set, shuffled within a buffer."""
    stream = open_hub_stream(config.source, config.subset, config.split)
    stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_DOCUMENTS)
    stream.set_epoch(epoch)
    documents = hub_documents(stream, config.source, config.text_field)
    return tokenize_documents(_without(held_out, documents), tokenizer)
