"""Tokenised documents: text to token ids in batches, kept on disk as one flat array that is mapped, not loaded."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moxe.data.encoding import Encoded, Encoding, Tokens, token_dtype
from moxe.data.workers import encode_batches
from moxe.errors import UserError

# Characters that are encoded together: enough work for every core, little memory.
BATCH_CHARACTERS = 2**20

Place = TypeVar("Place")


@dataclass(frozen=True)
class TextBatch(Generic[Place]):
    """Documents that are encoded together, and the place in their source after the last of them."""

    texts: list[str]
    end: Place


def text_batches(documents: Iterable[tuple[str, Place]]) -> Iterator[TextBatch[Place]]:
    """Documents, each with the place in their source after it, in batches of BATCH_CHARACTERS."""
    texts: list[str] = []
    characters = 0
    end = None
    for text, end in documents:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield TextBatch(texts, end)
            texts, characters = [], 0
    if texts:
        assert end is not None
        yield TextBatch(texts, end)


def encoding_of(tokenizer: PreTrainedTokenizerFast, left_out: Iterable[int] = ()) -> Encoding:
    """The tokenizer's bos token, the text, its eos token, for all documents but those of the hashes in `left_out`.

    Targets never cross documents, so without a token in front the first token of a text would never be learned, nor
    how to begin one. What looks like a special token inside a text is text.
    """
    # A copy, since a published tokenizer may cut, pad or add tokens of its own, and others rely on those settings.
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.no_truncation()
    inner.no_padding()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(begin, int)  # load_tokenizer sees to it
    assert isinstance(end, int)
    return Encoding(inner.to_str(), begin, end, len(tokenizer), frozenset(left_out))


def tokenize_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """The token ids of each document, as `encoding_of` says, in this process.

    Yields:
        One array [tokens + 2] a document, in the order of the documents.
    """
    batches = text_batches((text, 0) for text in documents)
    for _, (tokens, lengths) in encode_batches(batches, encoding_of(tokenizer), num_workers=1):
        yield from np.split(tokens, np.cumsum(lengths)[:-1])


def cut(encoded: Encoded, max_tokens: int) -> Encoded:
    """The documents up to `max_tokens` tokens in all; the last one is cut there."""
    tokens, lengths = encoded
    before = np.cumsum(lengths) - lengths
    kept = before < max_tokens
    return tokens[:max_tokens], np.minimum(lengths, max_tokens - before)[kept]


class TokenDocuments(Sequence[Tokens]):
    """Documents as token ids: `documents[i]` is a view [length of document i] of one array on disk."""

    def __init__(self, folder: str | Path) -> None:
        """Maps what `write_token_documents` wrote to a folder."""
        self.folder = Path(folder)
        self.vocab_size: int = json.loads((self.folder / "documents.json").read_text())["vocab_size"]
        self.offsets: npt.NDArray[np.int64] = np.load(self.folder / "offsets.npy")
        dtype = token_dtype(self.vocab_size)
        # An empty file cannot be mapped.
        empty = self.offsets[-1] == 0
        self.tokens: Tokens = (
            np.empty(0, dtype) if empty else np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r")
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[type["TokenDocuments"], tuple[Path]]:
        # A worker process maps the file again; pickling the map would copy all of it.
        return TokenDocuments, (self.folder,)


def write_token_documents(documents: Iterable[Tokens], folder: Path, vocab_size: int) -> TokenDocuments:
    """Writes documents to a new folder as they come, and maps them.

    Raises:
        UserError: if an id is not below `vocab_size`.
    """
    folder.mkdir(parents=True)
    lengths = []
    with (folder / "tokens.bin").open("wb") as file:
        for document in documents:
            if len(document) and (largest := int(document.max())) >= vocab_size:
                raise UserError(f"A document holds the token id {largest}, but the vocabulary has {vocab_size}.")
            file.write(np.ascontiguousarray(document, dtype=token_dtype(vocab_size)).data)
            lengths.append(len(document))
    write_index(folder, np.array(lengths, dtype=np.int64), vocab_size)
    return TokenDocuments(folder)


def write_index(folder: Path, lengths: npt.NDArray[np.int64], vocab_size: int) -> None:
    """Writes what makes a folder with tokens.bin one of documents, from the tokens of each document."""
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    (folder / "documents.json").write_text(json.dumps({"vocab_size": vocab_size}))
