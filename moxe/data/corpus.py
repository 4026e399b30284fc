"""From the `data` section of a recipe to rows: read, hold out, train or load a tokenizer, tokenise once, pack.

Tokenised data is kept in `<cache_dir>/<key>/`, where the key is a hash of everything that decides it: the contents of
the files (the revision of a hub data set), the tokenizer, the settings of reading and holding out. A change of any of
these is another folder; a run that needs the same tokens again maps them at once. Folder by folder:

    train/              the training documents as tokens (not for a source that is streamed during training)
    validation/         the held-out documents as tokens
    validation.jsonl    the held-out documents as text
    tokenizer/          the tokenizer, where it was trained here
    manifest.json       the SHA-256 of each of these files, compared before they are used
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from moxe.data.build import find_sources, is_streamed, make_folder, read_validation_texts
from moxe.data.config import DataConfig
from moxe.data.encoding import document_hash
from moxe.data.hub import hub_documents
from moxe.data.packing import Block, PackedDataset, PackedStream
from moxe.data.sources import Source, Sources
from moxe.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from moxe.data.tokens import TokenDocuments, tokenize_documents
from moxe.errors import PassingError, UserError
from moxe.manifest import MANIFEST

# Part of every key: raise it when the same settings would give other files than before.
CACHE_VERSION = 2
# Documents of a stream that are shuffled together.
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
        fingerprint: a SHA-256 in hexadecimal digits, which is the same exactly when the training tokens, the validation
            tokens and the tokenizer are; of a streamed source, when its revision and the settings of reading are.
    """

    train: PackedDataset | PackedStream
    validation: PackedDataset
    tokenizer: PreTrainedTokenizerFast
    validation_texts: list[str]
    statistics: CorpusStatistics
    fingerprint: str


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
        PassingError: for a failure that may pass; the next call goes on from there, as after an interruption.
    """
    start = time.perf_counter()
    sources = find_sources(config)
    _check(config, sources)
    tokenizer = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    sources = sources.pinned()
    folder = Path(os.path.expanduser(config.cache_dir)) / _key(config, sources, tokenizer)
    cached = make_folder(config, sources, tokenizer, folder, progress)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder / "tokenizer")
    texts = read_validation_texts(folder)
    packed = {"sequence_length": config.sequence_length, "pad_token_id": tokenizer.pad_token_id}
    validation = PackedDataset(TokenDocuments(folder / "validation"), **packed)
    streamed = is_streamed(config, sources)
    if streamed:
        held_out = frozenset(map(document_hash, texts))
        train_documents = None
        train = PackedStream(partial(_stream_blocks, config, sources.training, seed, tokenizer, held_out), **packed)
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
    return Corpus(train, validation, tokenizer, texts, statistics, _fingerprint(tokenizer, folder, streamed))


def _check(config: DataConfig, sources: Sources) -> None:
    if config.subset is not None and not sources.training.is_hub:
        raise UserError(f"data.subset is {config.subset!r}, but the source {config.source!r} is no hub data set.")
    if config.validation_split is not None and not sources.to_validate.is_hub:
        raise UserError(
            f"data.validation_split is {config.validation_split!r}, but the validation data come from "
            f"{config.validation_source or config.source!r}, which is no hub data set."
        )


def _key(config: DataConfig, sources: Sources, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Names the cache folder; equal where the tokens would be."""
    decides = {
        "version": CACHE_VERSION,
        "source": _content(sources.training),
        "split": config.split,
        "validation_source": sources.validation and _content(sources.validation),
        "validation": [config.validation_split, config.validation_documents, config.validation_fraction],
        "reading": [config.text_field, config.document_separator, config.max_tokens],
        "tokenizer": ["train", config.vocab_size] if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]


def _content(source: Source) -> list[str | None]:
    """What a source holds: the kind and hash of each local file, or the revision of a hub data set."""
    if source.files is None:
        return [source.name, source.subset, source.revision]
    content: list[str | None] = []
    for path in source.files:
        try:
            with path.open("rb") as file:
                content += [path.suffix, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise PassingError(f"The data file {str(path)!r} cannot be read: {error.strerror or error}.") from error
    return content


def _fingerprint(tokenizer: PreTrainedTokenizerFast, folder: Path, streamed: bool) -> str:
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    parts = ["validation"] if streamed else ["validation", "train"]
    hashes = [files[f"{part}/{name}"]["sha256"] for part in parts for name in ("tokens.bin", "offsets.npy")]
    # What a stream gives is not here; the name of the folder holds the revision and all settings of reading.
    stream = folder.name if streamed else None
    decides = [hashes, stream, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _stream_blocks(
    config: DataConfig,
    source: Source,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    held_out: frozenset[int],
    epoch: int,
    place: dict[str, Any] | None,
) -> Iterator[Block]:
    """The training documents of a pass over a streamed data set, shuffled block by block, from a block on.

    The order of the data set's files and of the documents of a block are the seed's and the pass's, so a block is the
    same however reading came to it.
    """
    place = place or {"number": 0, "source": None}
    documents = hub_documents(
        source.name,
        source.subset,
        config.split,
        config.text_field,
        revision=source.revision,
        shuffle_seed=[seed, epoch],
        place=place["source"],
    )
    while read := list(islice(documents, SHUFFLE_BUFFER_DOCUMENTS)):
        order = np.random.default_rng([seed, epoch, place["number"]]).permutation(len(read))
        texts = (read[index][0] for index in order)
        kept = (text for text in texts if document_hash(text) not in held_out)
        yield Block(place, tokenize_documents(kept, tokenizer))
        place = {"number": place["number"] + 1, "source": read[-1][1]}
