"""The `data` section of a recipe."""

import os
from dataclasses import dataclass, field

from moxe.errors import UserError

# Of a tokenizer that is trained here: the 256 bytes, the end of a document and the padding.
SMALLEST_VOCABULARY = 258
MOST_WORKERS = 1024


def default_cache_dir() -> str:
    """Where tokenised data is kept: the environment variable MOXE_CACHE, or ~/.cache/moxe."""
    return os.environ.get("MOXE_CACHE") or "~/.cache/moxe"


@dataclass
class DataConfig:
    """What to train and validate on, and how text becomes rows of tokens.

    Args:
        source: "builtin" (the English inside every CPython); a file, folder or glob of .txt, .jsonl or .parquet; or the
            name "owner/name" of a data set on the Hugging Face hub, which is streamed.
        subset: configuration name of a hub data set.
        split: split of a hub data set that is trained on.
        validation_source: as `source`, read for validation only; none: a part of `source` is held out.
        validation_split: split of the hub data set to validate on; none: the first documents of `split` are held out.
        validation_documents: most documents to validate on; none: `validation_fraction` of a local source, all of a
            local `validation_source`, 1,000 of a hub data set.
        validation_fraction: part of the documents of a local source (or the built-in one) that is held out.
        text_field: the field (.jsonl) or column (.parquet, hub) that holds the text.
        document_separator: the line that ends a document in a .txt file; "" makes every blank line one.
        max_tokens: stop reading the training source after so many tokens; none: read it all.
        tokenizer: "train" (a byte-level BPE trained on the training documents), the path of a tokenizer.json or of a
            folder that holds one, or the name of a tokenizer on the hub.
        vocab_size: size of a tokenizer that is trained here.
        sequence_length: tokens a row.
        num_workers: processes that tokenise, 1,024 at most; 1: the one that trains, on threads of its own; none: as
            many as it has cores, and 16 at most. The tokens do not depend on it, and few documents are tokenised
            without starting any.
        cache_dir: folder that keeps tokenised data; the environment variable MOXE_CACHE overrides the default.
    """

    source: str = "builtin"
    subset: str | None = None
    split: str = "train"
    validation_source: str | None = None
    validation_split: str | None = None
    validation_documents: int | None = None
    validation_fraction: float = 0.05
    text_field: str = "text"
    document_separator: str = "<|endoftext|>"
    max_tokens: int | None = None
    tokenizer: str = "train"
    vocab_size: int = 4096
    sequence_length: int = 256
    num_workers: int | None = None
    cache_dir: str = field(default_factory=default_cache_dir)

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError(
                f"data.sequence_length is {self.sequence_length}; a row needs 2 tokens or more: one to predict another."
            )
        if self.tokenizer == "train" and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"data.vocab_size is {self.vocab_size}; a tokenizer trained here needs {SMALLEST_VOCABULARY} or more."
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UserError(f"data.max_tokens is {self.max_tokens}; give 2 or more, or null for the whole source.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        if self.validation_documents is not None and self.validation_documents < 1:
            raise UserError(f"data.validation_documents is {self.validation_documents}; give 1 or more, or null.")
        if self.num_workers is not None and not 1 <= self.num_workers <= MOST_WORKERS:
            raise UserError(
                f"data.num_workers is {self.num_workers}; give 1 to {MOST_WORKERS:,}, or null for one a core."
            )
        for name in ("source", "validation_source", "tokenizer", "cache_dir"):
            if getattr(self, name) == "":  # as a path it would be the working folder
                raise UserError(f"data.{name} is empty; give a path or a name, or leave the setting out.")
        if not self.text_field:
            raise UserError("data.text_field is empty; give the name of the field or column that holds the text.")
        if "\n" in self.document_separator:
            raise UserError(
                f"data.document_separator is {self.document_separator!r}; it is one whole line, without a line break."
            )
