"""LAMBADA's measures against lm-evaluation-harness's definition, written out one example at a time."""

from __future__ import annotations

import copy
import inspect
import math
import random

import pytest
import torch
from tokenizers import normalizers

from moxe.data.sources import read_documents
from moxe.errors import UserError
from moxe.evaluation.last_word import LAMBADA, evaluate_last_word, score_last_words

EXAMPLES = [
    "the old man and the sea went to the quiet town in the morning",
    "she saw the green hill and the white house by the old road",
    "a white bird went over the hill to the sea in the mist",
    "two  spaces before the  end",  # white space before the last word belongs to the word
    "a line\nends\n here",
    "word",  # no context: predicted from the start token
    " word",
    "a «curly» quotation's naïve unfamiliarity",
    "the old man",
    "the sea\nmorning",
]


@torch.no_grad()
def by_definition(model, tokenizer, text):
    """(log-likelihood, all greedy) of one text: the task's templates, `_encode_pair` and `_loglikelihood_tokens`."""
    context = " ".join(text.split(" ")[:-1])
    continuation = " " + text.split(" ")[-1]
    if context == "":
        context_enc = [tokenizer.bos_token_id]
        continuation_enc = tokenizer.encode(continuation, add_special_tokens=False)
    else:
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole_enc = tokenizer.encode(context + continuation, add_special_tokens=False)
        context_enc = tokenizer.encode(context, add_special_tokens=False)
        continuation_enc = whole_enc[len(context_enc) :]
    tokens = torch.tensor([context_enc + continuation_enc])
    log_probabilities = model(input_ids=tokens[:, :-1]).logits[0].double().log_softmax(-1)
    log_likelihood, greedy = 0.0, True
    for position in range(len(context_enc) - 1, tokens.shape[1] - 1):
        target = tokens[0, position + 1]
        log_likelihood += log_probabilities[position, target].item()
        greedy = greedy and bool(log_probabilities[position].argmax() == target)
    return log_likelihood, greedy


@torch.no_grad()
def greedily_ended(model, tokenizer, count):
    """Texts whose last word is a single token and is what the model itself would say."""
    texts, words, generator = [], " ".join(EXAMPLES[:3]).split(), random.Random(0)
    while len(texts) < count:
        context = " ".join(generator.choices(words, k=generator.randint(1, 12)))
        token = model(input_ids=torch.tensor([tokenizer.encode(context)])).logits[0, -1].argmax()
        piece = tokenizer.decode(token)
        if piece.startswith(" ") and piece[1:].isalpha() and piece.isascii():
            texts.append(context + piece)
    return texts


def test_measures_equal_the_harness_definition_one_example_at_a_time(model, tokenizer):
    examples = EXAMPLES + greedily_ended(model, tokenizer, 4)
    expected = [by_definition(model, tokenizer, text) for text in examples]
    result = evaluate_last_word(model, examples, tokenizer, batch_size=5)
    mean = sum(log_likelihood for log_likelihood, _ in expected) / len(expected)
    assert result.last_word_perplexity == pytest.approx(math.exp(-mean), rel=1e-4)
    assert result.last_word_accuracy == sum(greedy for _, greedy in expected) / len(expected)
    assert 0 < result.last_word_accuracy < 1
    assert result.examples == len(examples)


def test_scores_keep_the_order_of_the_examples(model, tokenizer):
    scores = score_last_words(model, EXAMPLES, tokenizer, batch_size=4)
    for score, text in zip(scores, EXAMPLES, strict=True):
        assert score.log_likelihood == pytest.approx(by_definition(model, tokenizer, text)[0], rel=1e-4)


def test_batch_size_and_order_of_examples_change_nothing(moxe, tokenizer):
    reference = evaluate_last_word(moxe, EXAMPLES, tokenizer, batch_size=1)
    for batch_size in (2, 3, 100):
        shuffled = random.Random(batch_size).sample(EXAMPLES, len(EXAMPLES))
        result = evaluate_last_word(moxe, shuffled, tokenizer, batch_size=batch_size)
        assert result.last_word_perplexity == pytest.approx(reference.last_word_perplexity, rel=1e-4)
        assert result.last_word_accuracy == reference.last_word_accuracy
        assert result.tokens == reference.tokens


def test_a_last_word_of_several_tokens_is_right_only_if_each_token_is(moxe, tokenizer):
    text = greedily_ended(moxe, tokenizer, 1)[0]
    assert score_last_words(moxe, [text], tokenizer)[0].is_greedy
    longer = score_last_words(moxe, [text + "~^~"], tokenizer)[0]
    assert longer.num_targets > 1
    assert not longer.is_greedy


def test_perplexity_a_token_divides_by_the_tokens_of_the_last_words(moxe, tokenizer):
    scores = score_last_words(moxe, EXAMPLES, tokenizer)
    result = evaluate_last_word(moxe, EXAMPLES, tokenizer)
    assert result.tokens == sum(score.num_targets for score in scores) > result.examples
    mean = sum(score.log_likelihood for score in scores) / result.tokens
    assert result.last_token_perplexity == pytest.approx(math.exp(-mean), rel=1e-9)


def test_a_text_longer_than_the_models_positions_loses_its_left_end(llama, tokenizer):
    ending = "the old house by the sea"
    long_text = " ".join(EXAMPLES[:3] * 4) + " " + ending
    tokens = tokenizer.encode(long_text, add_special_tokens=False)
    positions = llama.config.max_position_embeddings
    assert len(tokens) > positions
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([tokens[-positions - 1 : -1]])).logits[0, -1]
    expected = logits.double().log_softmax(-1)[tokens[-1]].item()
    score = score_last_words(llama, [long_text], tokenizer)[0]
    assert score.num_targets == 1
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_a_last_word_longer_than_the_models_positions_is_refused(llama, tokenizer):
    with pytest.raises(UserError, match="more than the model's 64 positions"):
        evaluate_last_word(llama, ["a " + "~" * 100], tokenizer)


@pytest.mark.parametrize("text", ["", "ends in a space ", " "])
def test_a_text_without_a_last_word_is_refused_with_its_number(moxe, tokenizer, text):
    with pytest.raises(UserError, match="example 2 has no last word"):
        evaluate_last_word(moxe, ["the sea", text], tokenizer)


def test_a_last_word_that_the_tokenizer_drops_is_refused(moxe, tokenizer):
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.normalizer = normalizers.Replace(" ~", "")
    dropping = type(tokenizer)(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    with pytest.raises(UserError, match="no token for the last word ' ~'"):
        evaluate_last_word(moxe, ["the sea ~"], dropping)


def test_no_examples_are_refused(moxe, tokenizer):
    with pytest.raises(UserError, match="no example"):
        evaluate_last_word(moxe, [], tokenizer)


def test_a_batch_size_of_zero_is_refused(moxe, tokenizer):
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        evaluate_last_word(moxe, EXAMPLES, tokenizer, batch_size=0)


def test_a_progress_bar_is_shown_only_if_asked(moxe, tokenizer, capsys):
    evaluate_last_word(moxe, EXAMPLES, tokenizer)
    assert not capsys.readouterr().out
    evaluate_last_word(moxe, EXAMPLES, tokenizer, progress=True)
    assert "last words" in capsys.readouterr().out


def test_the_result_has_the_names_of_the_command_line(moxe, tokenizer):
    result = evaluate_last_word(moxe, EXAMPLES, tokenizer).to_dict()
    assert {"last_word_perplexity", "last_word_accuracy", "examples"} <= set(result)


def test_the_hub_set_is_named_in_the_words_of_read_documents():
    assert set(LAMBADA) <= set(inspect.signature(read_documents).parameters)
