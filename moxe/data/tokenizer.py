"""Tokenizers: trained on the data, read from a file or taken from the Hugging Face hub."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moxe.data.config import SMALLEST_VOCABULARY
from moxe.data.console import reason
from moxe.data.encoding import is_failure_of_a_library
from moxe.errors import UserError
from moxe.manifest import require_unchanged

# What a folder keeps of a tokenizer.
FILES = ("tokenizer*", "special_tokens*")

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
# Tokens that end a document in published tokenizers, looked for where a bare tokenizer.json does not say which it is.
KNOWN_ENDS_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on documents: any text has tokens and comes back exactly; same documents, same tokens.

    `<|endoftext|>` (id 0) begins and ends documents, `<|pad|>` (id 1) fills rows. The vocabulary is smaller than
    `vocab_size` where the documents hold too few distinct pairs.

    Raises:
        UserError: if `vocab_size` has no room for the 256 bytes and the two special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"data.vocab_size is {vocab_size}; a byte-level tokenizer needs {SMALLEST_VOCABULARY} or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _wrap(tokenizer)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a tokenizer.json, from a folder that holds one (a run, a checkpoint) or from the hub.

    The tokenizer always has an end-of-document token, which is also the beginning of a document and the padding where
    it names no others. A tokenizer.json that has none of the usual ones gets `<|endoftext|>` as a further token.

    In a folder with a manifest, every file of the tokenizer must be as it was written. No code that comes with a
    tokenizer is ever run.

    Raises:
        UserError: if the file or folder holds no tokenizer, there is no such path and the hub does not give one of this
            name, or what it gives is not a fast one.
        DamagedError: if a file of the tokenizer is not what the folder's manifest says.
    """
    path = Path(os.path.expanduser(name_or_path))  # Path.expanduser fails for a user that is not there
    if path.is_file():
        try:
            return _wrap(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except BaseException as error:
            if not is_failure_of_a_library(error):
                raise
            raise UserError(f"The file {str(path)!r} is no tokenizer.json: {reason(error)}.") from error
    if path.is_dir() or path.suffix == ".json" or str(name_or_path).startswith((".", "/", "~")):
        if not (path / "tokenizer.json").is_file():
            raise UserError(
                f"There is no tokenizer at {str(name_or_path)!r}; give a tokenizer.json, a folder that holds one, the "
                'name of a tokenizer on the Hugging Face hub, or "train".'
            )
        files = (entry.name for entry in path.iterdir() if entry.is_file())
        present = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in FILES))
        require_unchanged(path, FILES, required=present)  # one that is not listed was put there later
        if not (path / "tokenizer_config.json").is_file():
            return load_tokenizer(path / "tokenizer.json")
    return _from_pretrained(str(path if path.is_dir() else name_or_path))


def _from_pretrained(name_or_path: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            return _with_special_tokens(tokenizer)
    except BaseException as error:  # missing name, gated, no network, not a tokenizer: each library has its own
        if not is_failure_of_a_library(error):
            raise
        raise UserError(
            f"The tokenizer {name_or_path!r} cannot be loaded, neither from a path nor from the Hugging Face hub: "
            f"{reason(error)}."
        ) from error
    raise UserError(f"The tokenizer {name_or_path!r} has no fast version (tokenizer.json), which is needed here.")


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    padding = {"pad_token": PADDING} if PADDING in special else {}
    return _with_special_tokens(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **padding)
    )


def _with_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Names the end of a document, and the beginning and the padding where the tokenizer has none."""
    if tokenizer.eos_token is None:
        vocabulary = tokenizer.get_vocab()
        known = (token for token in KNOWN_ENDS_OF_DOCUMENT if token in vocabulary)
        tokenizer.add_special_tokens({"eos_token": next(known, END_OF_DOCUMENT)})
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A text that is the same for tokenizers that turn documents into the same tokens."""
    return json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.backend_tokenizer.to_str()])
