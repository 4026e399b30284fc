import lzma
import math
import zlib
from itertools import pairwise

import numpy as np
import pytest

from moxe.data import baselines
from moxe.data.baselines import text_baselines

TEXTS = ["abc", "äb"]


def test_the_unigram_is_add_one_smoothed_over_the_whole_vocabulary(write_documents):
    train = write_documents([0, 1, 1, 2, 0], vocab_size=4)
    validation = write_documents([0, 1, 3, 0], [0, 2, 0], vocab_size=4)
    # Predicted in training: 1, 1, 2, 0. Held out: 1 and 3 of the first text, 2 of the second; not the ends.
    nats = -math.log(3 / 8) - math.log(1 / 8) - math.log(2 / 8)
    unigram = text_baselines(train, validation, TEXTS).unigram
    assert unigram is not None
    assert unigram.nats_per_token == pytest.approx(nats / 3)
    assert unigram.bits_per_byte == pytest.approx(nats / math.log(2) / 6)


def test_the_bigram_is_its_definition(write_documents, monkeypatch):
    rng = np.random.default_rng(0)
    train = [[0, *rng.integers(1, 6, size=8).tolist(), 0] for _ in range(30)]
    validation = [[0, *rng.integers(1, 8, size=8).tolist(), 0] for _ in range(5)]
    used: list[float] = []
    best = baselines._best_weight
    monkeypatch.setattr(baselines, "_best_weight", lambda *args: used.append(best(*args)) or used[0])
    result = text_baselines(write_documents(*train), write_documents(*validation), TEXTS).bigram

    pairs = [pair for ids in train for pair in pairwise(ids)]
    firsts, seconds = zip(*pairs, strict=True)
    nats = tokens = 0
    for ids in validation:
        for first, second in pairwise(ids[:-1]):
            probability = (seconds.count(second) + 1) / (len(pairs) + 100)
            if first in firsts:
                relative = pairs.count((first, second)) / firsts.count(first)
                probability = used[0] * relative + (1 - used[0]) * probability
            nats -= math.log(probability)
            tokens += 1
    assert result is not None
    assert 0 < used[0] < 1
    assert result.nats_per_token == pytest.approx(nats / tokens)


def test_the_weight_of_the_bigram_is_the_best_one():
    rng = np.random.default_rng(0)
    unigram, bigram = rng.uniform(0.01, 0.3, 200), rng.uniform(0, 0.5, 200)
    bigram[::7] = np.nan
    known = ~np.isnan(bigram)

    def likelihood(weight):
        return np.log(weight * bigram[known] + (1 - weight) * unigram[known]).sum()

    weight = baselines._best_weight(unigram, bigram)
    assert likelihood(weight) >= max(likelihood(other) for other in np.linspace(0.001, 0.999, 999)) - 1e-9


def test_the_held_out_text_does_not_choose_the_weight(write_documents):
    train = write_documents(*[[0, 1, 2, 3, 0] for _ in range(20)])
    # Pairs of the training text never occur here, so a weight chosen here would be 0, and the cost the unigram's.
    result = text_baselines(train, write_documents([0, 3, 2, 1, 0]), TEXTS)
    assert result.unigram is not None
    assert result.bigram is not None
    assert result.bigram.nats_per_token > result.unigram.nats_per_token + 1


@pytest.mark.parametrize("count", [1, 9, 10, 11])
def test_a_bigram_beats_the_unigram_on_text_with_an_order(write_documents, count):
    train = write_documents(*[[0, *[1, 2, 3, 4] * 30, 0] for _ in range(count)])
    result = text_baselines(train, write_documents([0, *[1, 2, 3, 4] * 5, 0]), TEXTS)
    assert result.unigram is not None
    assert result.bigram is not None
    assert result.bigram.nats_per_token < result.unigram.nats_per_token - 0.5


def test_no_pair_crosses_documents(write_documents):
    train = write_documents([0, 1, 0], [2, 3, 0])
    firsts, seconds, documents = baselines._pairs(train, 2)
    assert list(zip(firsts, seconds, documents, strict=True)) == [(0, 1, 0), (1, 0, 0), (2, 3, 1), (3, 0, 1)]


def test_only_the_first_training_documents_are_counted_where_there_are_too_many(write_documents, monkeypatch):
    validation = write_documents([0, 1, 2, 0])
    few = text_baselines(write_documents([0, 1, 2, 0]), validation, TEXTS)
    monkeypatch.setattr(baselines, "MAX_TRAINING_TOKENS", 7)
    assert text_baselines(write_documents([0, 1, 2, 0], [0, 5, 5, 0]), validation, TEXTS) == few


def test_compression_is_of_all_texts_as_one_stream(write_documents):
    result = text_baselines(None, write_documents([0, 1, 2, 0], [0, 1, 0]), TEXTS)
    assert (result.unigram, result.bigram) == (None, None)
    stream = "abcäb".encode()
    assert result.zlib.bits_per_byte == pytest.approx(8 * len(zlib.compress(stream, 9)) / 6)
    assert result.zlib.nats_per_token == pytest.approx(8 * math.log(2) * len(zlib.compress(stream, 9)) / 3)
    assert result.lzma.bits_per_byte == pytest.approx(8 * len(lzma.compress(stream, preset=9)) / 6)
