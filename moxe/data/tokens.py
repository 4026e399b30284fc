"""Tokenised documents: text to token ids in batches, kept on disk as one flat array that is mapped, not loaded."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Characters that are encoded together: enough work for every core, little memory.
BATCH_CHARACTERS = 2**20

Tokens = npt.NDArray[np.unsignedinteger]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id of the vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def tokenize_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """The token ids of each document: the tokenizer's bos token, the text, its eos token.

    Targets never cross documents, so without a token in front the first token of a text would never be learned, nor
    how to begin one. What looks like a special token inside a text is text.

    Yields:
        One array [tokens + 2] a document, in the order of the documents.
    """
    dtype = token_dtype(len(tokenizer))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    # A copy, since a published tokenizer may cut, pad or add tokens of its own, and others rely on those settings.
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    for batch in _batches(documents):
        for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([begin, *encoding.ids, end], dtype=dtype)


def cut_at(documents: Iterable[Tokens], max_tokens: int | None) -> Iterator[Tokens]:
    """The documents up to `max_tokens` tokens in all; the last one is cut there. None: all of them."""
    left = max_tokens
    for document in documents:
        if left is None:
            yield document
            continue
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
    """Writes documents to a new folder as they come, and maps them."""
    folder.mkdir(parents=True)
    offsets = [0]
    with (folder / "tokens.bin").open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, dtype=token_dtype(vocab_size)).data)
            offsets.append(offsets[-1] + len(document))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    (folder / "documents.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return TokenDocuments(folder)
