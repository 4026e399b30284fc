"""Texts to token ids, in this process or, run as a script, in one of many.

As a script it must start at once, so it imports nothing of moxe, torch or transformers.
"""

import hashlib
import os
import pickle
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.unsignedinteger]
# Token ids of documents end to end [tokens], and the number of tokens of each [documents].
Encoded = tuple[Tokens, npt.NDArray[np.int64]]

# What a worker writes before its first answer, on a line of its own: what comes before it is not the worker's.
READY = b"moxe encodes\n"


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id of the vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def document_hash(text: str) -> int:
    """A number in [0, 2^64) from the letters of a text, so copies that differ in case, spacing, punctuation or numbers
    have the same; a text without letters counts as it is."""
    letters = re.sub(r"[\W\d_]+", "", text).casefold() or text
    return int.from_bytes(hashlib.blake2b(letters.encode(), digest_size=8).digest(), "big")


def is_failure_of_a_library(error: BaseException) -> bool:
    """Whether a library failed at what it was given. A Rust library that panics raises no Exception, and its class has
    no public name."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens; plain values, which another process can be sent.

    Args:
        tokenizer: the JSON of a `tokenizers.Tokenizer` that neither cuts nor pads.
        begin, end: ids before and after each document.
        vocab_size: every id is below it.
        left_out: `document_hash` of documents that are left out.
    """

    tokenizer: str
    begin: int
    end: int
    vocab_size: int
    left_out: frozenset[int] = frozenset()


class Encoder:
    """Encodes batches of documents."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.tokenizer = Tokenizer.from_str(encoding.tokenizer)
        self.tokenizer.encode_special_tokens = True  # not part of the JSON

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The documents that are not left out, each between the ids that begin and end one.

        Raises:
            ValueError: if the tokenizer gives an id outside the vocabulary.
        """
        encoding = self.encoding
        if encoding.left_out:
            texts = [text for text in texts if document_hash(text) not in encoding.left_out]
        ids: list[int] = []
        lengths = []
        for encoded in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids.append(encoding.begin)
            ids.extend(encoded.ids)
            ids.append(encoding.end)
            lengths.append(len(encoded) + 2)
        tokens = np.array(ids, dtype=np.uint32)
        if len(ids) and (largest := int(tokens.max())) >= encoding.vocab_size:
            raise ValueError(f"the tokenizer gives the id {largest}, but has {encoding.vocab_size} tokens")
        return tokens.astype(token_dtype(encoding.vocab_size)), np.array(lengths, dtype=np.int64)


def _serve() -> None:
    """Answers pickled batches on the standard input with pickled results on the standard output, until it closes.

    A result is `Encoded`, or an exception that says why there is none. READY comes before the first. The first message
    is an `Encoding` as a dictionary. What ends the process that started this one closes the pipes,
    so this one ends too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; ours decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may get between the answers, whatever it is that prints
    try:
        answers.write(b"\n" + READY)
        answers.flush()
        encoder = Encoder(Encoding(**pickle.load(source)))
        while True:
            texts = pickle.load(source)
            try:
                answer: Encoded | Exception = encoder(texts)
            except MemoryError:
                answer = MemoryError()
            except BaseException as error:
                if not is_failure_of_a_library(error):
                    raise
                answer = ValueError(str(error) or type(error).__name__)  # its own class may not be known elsewhere
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # closed, perhaps in the middle of a message
        os._exit(0)  # without flushing to nobody, which Python would complain about


if __name__ == "__main__":
    _serve()
