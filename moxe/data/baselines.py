"""What a model must beat on held-out text: token counts and general-purpose compression.

The token baselines predict what perplexity counts: every token of each held-out text, its first one from the bos token,
without the eos token. Bits a byte divide the whole cost by the UTF-8 bytes of the texts.
"""

import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moxe.data.tokens import TokenDocuments

# Token counts settle long before this; a bound on time and memory for large corpora.
MAX_TRAINING_TOKENS = 50_000_000
# The bigram's weight is chosen on every tenth training document.
WEIGHT_EVERY = 10

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baseline:
    """The mean cost of held-out text: nats a predicted token, bits a byte of text."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class TextBaselines:
    """Baselines on the same held-out text; `unigram` and `bigram` are None where no training tokens were given.

    Args:
        unigram: (count + 1) / (tokens + vocabulary).
        bigram: w · count(pair) / count(first) + (1 - w) · unigram, and the unigram alone after a token that was never
            seen first; w maximises the likelihood of every tenth training document under the counts of the others.
        zlib: deflate (as in gzip and zip) at level 9 over all documents as one stream.
        lzma: the same with LZMA (as in xz) at its highest setting.
    """

    unigram: Baseline | None
    bigram: Baseline | None
    zlib: Baseline
    lzma: Baseline


def text_baselines(
    train: TokenDocuments | None, validation: TokenDocuments, validation_texts: Sequence[str]
) -> TextBaselines:
    """The baselines of a held-out part.

    Args:
        train: training documents as tokens, of which at most the first MAX_TRAINING_TOKENS tokens are counted; None: a
            streamed source.
        validation: the held-out documents as tokens.
        validation_texts: the same documents as text.
    """
    num_bytes = sum(len(text.encode()) for text in validation_texts)
    firsts, seconds, documents = _pairs(validation, len(validation))
    in_text = documents[:-1] == documents[1:]  # the last pair of each document ends in eos
    firsts, seconds = firsts[:-1][in_text], seconds[:-1][in_text]

    def baseline(nats: float) -> Baseline:
        return Baseline(nats_per_token=nats / len(seconds), bits_per_byte=nats / math.log(2) / num_bytes)

    stream = "".join(validation_texts).encode()
    nats_a_byte = 8 * math.log(2)  # eight bits
    compressed = {
        "zlib": baseline(nats_a_byte * len(zlib.compress(stream, level=9))),
        "lzma": baseline(nats_a_byte * len(lzma.compress(stream, preset=9 | lzma.PRESET_EXTREME))),
    }
    if train is None:
        return TextBaselines(unigram=None, bigram=None, **compressed)
    count = int(np.searchsorted(train.offsets, MAX_TRAINING_TOKENS, side="right")) - 1
    train_firsts, train_seconds, documents = _pairs(train, max(count, 1))
    if documents[-1] + 1 >= WEIGHT_EVERY:
        tuning = documents % WEIGHT_EVERY == WEIGHT_EVERY - 1
    else:  # too few documents to spare whole ones
        tuning = np.arange(len(documents)) >= len(documents) * (1 - 1 / WEIGHT_EVERY)
    partial_counts = _PairCounts(train_firsts[~tuning], train_seconds[~tuning], train.vocab_size)
    weight = _best_weight(*partial_counts.probabilities(train_firsts[tuning], train_seconds[tuning]))
    counts = _PairCounts(train_firsts, train_seconds, train.vocab_size)
    unigram, bigram = counts.probabilities(firsts, seconds)
    return TextBaselines(
        unigram=baseline(-float(np.log(unigram).sum())),
        bigram=baseline(-float(np.log(_mixture(weight, unigram, bigram)).sum())),
        **compressed,
    )


def _pairs(documents: TokenDocuments, count: int) -> tuple[Ids, Ids, Ids]:
    """Every token of the first `count` documents with the token before it in its document: before, token, document."""
    offsets = documents.offsets[: count + 1]
    tokens = documents.tokens[: offsets[-1]].astype(np.int64)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    inside = owner[1:] == owner[:-1]
    return tokens[:-1][inside], tokens[1:][inside], owner[1:][inside]


class _PairCounts:
    """How often tokens, and pairs of neighbours, occur."""

    def __init__(self, firsts: Ids, seconds: Ids, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.as_first = np.bincount(firsts, minlength=vocab_size)
        self.as_second = np.bincount(seconds, minlength=vocab_size)
        self.pairs, self.pair_counts = np.unique(firsts * vocab_size + seconds, return_counts=True)

    def probabilities(self, firsts: Ids, seconds: Ids) -> tuple[Probabilities, Probabilities]:
        """Of each second token: by itself, add-one smoothed; after the first, relative frequency (NaN: never seen)."""
        unigram = (self.as_second[seconds] + 1) / (self.as_second.sum() + self.vocab_size)
        wanted = firsts * self.vocab_size + seconds
        place = np.searchsorted(self.pairs, wanted)
        padded_pairs, padded_counts = np.append(self.pairs, -1), np.append(self.pair_counts, 0)
        pair_count = np.where(padded_pairs[place] == wanted, padded_counts[place], 0)
        seen = self.as_first[firsts]
        bigram = np.divide(pair_count, seen, out=np.full(len(seen), np.nan), where=seen > 0)
        return unigram, bigram


def _mixture(weight: float, unigram: Probabilities, bigram: Probabilities) -> Probabilities:
    return np.where(np.isnan(bigram), unigram, weight * bigram + (1 - weight) * unigram)


def _best_weight(unigram: Probabilities, bigram: Probabilities) -> float:
    """The weight of the bigram that gives the highest likelihood, which is concave in it: bisection of its slope."""
    known = ~np.isnan(bigram)
    unigram, bigram = unigram[known], bigram[known]
    low, high = 0.0, 1.0
    for _ in range(20):
        weight = (low + high) / 2
        slope = ((bigram - unigram) / (weight * bigram + (1 - weight) * unigram)).sum()
        low, high = (weight, high) if slope > 0 else (low, weight)
    return (low + high) / 2
