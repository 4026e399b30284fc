"""Perplexity and bits a byte against a plain loop over documents and tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch

from moxe.errors import UserError
from moxe.evaluation import perplexity
from moxe.evaluation.perplexity import evaluate_perplexity, score_windows
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

DOCUMENTS = [
    "the old man and the sea went to the quiet town in the morning",
    "a",
    "Zoë's café — naïve!\n",
    "she saw the green hill and the white house by the old road. " * 2,
    "",
    "the sea",
    "\n\n  spaces   and\ttabs ",
    "a white bird went over the hill.\n\nthe road to the old house was unlit",
]


@torch.no_grad()
def summed_by_loop(model, tokenizer, documents, context_length=None):
    """Summed log-likelihood, tokens and bytes: one document (or window) at a time, one token at a time."""
    total, num_tokens, num_bytes = 0.0, 0, 0
    for document in documents:
        tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
        num_bytes += len(document.encode("utf-8"))
        num_tokens += len(tokens)
        sequence = [tokenizer.eos_token_id, *tokens]
        log_probabilities, first = torch.empty(0), -1
        for position in range(1, len(sequence)):
            # The window that predicts this token ends at the next multiple of context_length, or at the end.
            length = context_length or len(tokens)
            end = min(math.ceil(position / length) * length, len(tokens))
            if first != max(0, end - length):
                first = max(0, end - length)
                logits = model(input_ids=torch.tensor([sequence[first:end]])).logits[0]
                log_probabilities = logits.double().log_softmax(-1)
            total += log_probabilities[position - 1 - first, sequence[position]].item()
    return total, num_tokens, num_bytes


def assert_equals_loop(result, loop):
    total, num_tokens, num_bytes = loop
    assert (result.tokens, result.bytes) == (num_tokens, num_bytes)
    assert result.loss == pytest.approx(-total / num_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-total / num_tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-5)


def test_perplexity_of_whole_documents_equals_a_loop_over_their_tokens(moxe, tokenizer):
    result = evaluate_perplexity(moxe, DOCUMENTS, tokenizer, batch_size=3)
    assert_equals_loop(result, summed_by_loop(moxe, tokenizer, DOCUMENTS))
    assert result.documents == len(DOCUMENTS) - 1  # the empty one counts for nothing


@pytest.mark.parametrize("context_length", [1, 7, 64])
def test_perplexity_of_windows_equals_a_loop_over_their_tokens_for_any_causal_model(model, tokenizer, context_length):
    result = evaluate_perplexity(model, DOCUMENTS, tokenizer, context_length=context_length, batch_size=3)
    assert_equals_loop(result, summed_by_loop(model, tokenizer, DOCUMENTS, context_length))


def test_a_document_streamed_in_chunks_through_the_cache_equals_one_forward(moxe, tokenizer, monkeypatch):
    whole = evaluate_perplexity(moxe, DOCUMENTS, tokenizer)
    for chunk_length in (3, 16):
        monkeypatch.setattr(perplexity, "CHUNK_LENGTH", chunk_length)
        streamed = evaluate_perplexity(moxe, DOCUMENTS, tokenizer, batch_size=4)
        assert streamed.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.parametrize("context_length", [None, 10])
def test_batch_size_and_order_of_documents_change_nothing(moxe, tokenizer, context_length):
    reference = evaluate_perplexity(moxe, DOCUMENTS, tokenizer, batch_size=1, context_length=context_length)
    for batch_size in (2, 5, 64):
        shuffled = random.Random(batch_size).sample(DOCUMENTS, len(DOCUMENTS))
        result = evaluate_perplexity(moxe, shuffled, tokenizer, batch_size=batch_size, context_length=context_length)
        assert result.loss == pytest.approx(reference.loss, rel=1e-5)
        assert (result.tokens, result.bytes, result.documents) == (
            reference.tokens,
            reference.bytes,
            reference.documents,
        )


def test_the_tokens_weigh_the_mean_and_not_the_documents(moxe, tokenizer):
    parts = [evaluate_perplexity(moxe, [document], tokenizer) for document in DOCUMENTS if document]
    together = evaluate_perplexity(moxe, DOCUMENTS, tokenizer)
    weighted = sum(part.loss * part.tokens for part in parts) / sum(part.tokens for part in parts)
    assert together.loss == pytest.approx(weighted, rel=1e-5)


def test_documents_may_come_from_a_generator(moxe, tokenizer):
    from_list = evaluate_perplexity(moxe, DOCUMENTS, tokenizer)
    assert evaluate_perplexity(moxe, iter(DOCUMENTS), tokenizer) == from_list


def test_the_result_has_the_names_of_the_command_line(moxe, tokenizer):
    result = evaluate_perplexity(moxe, ["the sea"], tokenizer).to_dict()
    assert set(result) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"}


@pytest.mark.parametrize("context_length", [None, 7, 16])
@torch.no_grad()
def test_windows_are_those_of_the_perplexity_in_the_order_of_the_text(moxe, tokenizer, monkeypatch, context_length):
    monkeypatch.setattr(perplexity, "CHUNK_LENGTH", 8)
    result = evaluate_perplexity(moxe, DOCUMENTS, tokenizer, context_length=context_length)
    scores = score_windows(moxe, DOCUMENTS, tokenizer, context_length=context_length)
    assert sum(score.num_targets for score in scores) == result.tokens
    assert -math.fsum(score.log_likelihood for score in scores) / result.tokens == result.loss
    lengths = [len(tokenizer.encode(document)) for document in DOCUMENTS if document]
    size = context_length or 8
    assert [score.num_targets for score in scores] == [
        min(size, length - begin) for length in lengths for begin in range(0, length, size)
    ]
    first = 0
    for document in filter(None, DOCUMENTS):
        alone = score_windows(moxe, [document], tokenizer, context_length=context_length, batch_size=1)
        together = scores[first : first + len(alone)]
        first += len(alone)
        expected = [score.log_likelihood for score in alone]
        assert [score.log_likelihood for score in together] == pytest.approx(expected, rel=1e-5)


def test_a_model_with_its_state_carried_pairs_with_one_that_sees_windows(moxe, llama, tokenizer, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK_LENGTH", 8)
    carried = score_windows(moxe, DOCUMENTS, tokenizer, context_length=None)
    windows = score_windows(llama, DOCUMENTS, tokenizer, context_length=8)
    assert [score.num_targets for score in carried] == [score.num_targets for score in windows]
    alone = score_windows(moxe, DOCUMENTS, tokenizer, context_length=8)
    assert carried[0].log_likelihood == pytest.approx(alone[0].log_likelihood, rel=1e-5)
    assert carried != alone


def test_windows_of_a_model_without_recurrent_state_need_a_length(llama, tokenizer):
    with pytest.raises(UserError, match="context_length is needed for LlamaForCausalLM"):
        score_windows(llama, DOCUMENTS, tokenizer, context_length=None)


def test_the_model_is_left_in_the_mode_it_was_in_and_without_gradients(moxe, tokenizer):
    moxe.train()
    try:
        evaluate_perplexity(moxe, ["the sea"], tokenizer)
        assert moxe.training
    finally:
        moxe.eval()
    assert all(parameter.grad is None for parameter in moxe.parameters())


def test_a_diverged_model_has_an_infinite_or_undefined_perplexity_and_no_crash(llama, tokenizer):
    assert perplexity.exponential(1e6) == math.inf
    assert math.isnan(perplexity.exponential(math.nan))


@pytest.mark.parametrize("context_length", [None, 16])
def test_a_progress_bar_is_shown_only_if_asked(moxe, tokenizer, capsys, context_length):
    evaluate_perplexity(moxe, DOCUMENTS, tokenizer, context_length=context_length)
    assert not capsys.readouterr().out
    evaluate_perplexity(moxe, DOCUMENTS, tokenizer, context_length=context_length, progress=True)
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_documents_without_text_are_refused(moxe, tokenizer, documents):
    with pytest.raises(UserError, match="no text to evaluate"):
        evaluate_perplexity(moxe, documents, tokenizer)


def test_a_model_without_recurrent_state_needs_a_context_length(llama, tokenizer):
    with pytest.raises(UserError, match="context_length is needed for LlamaForCausalLM"):
        evaluate_perplexity(llama, DOCUMENTS, tokenizer)


def test_sizes_out_of_range_are_refused(llama, tokenizer):
    with pytest.raises(UserError, match="context_length=0 must be at least 1"):
        evaluate_perplexity(llama, DOCUMENTS, tokenizer, context_length=0)
    with pytest.raises(UserError, match="context_length=65 is more than the model's 64 positions"):
        evaluate_perplexity(llama, DOCUMENTS, tokenizer, context_length=65)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        evaluate_perplexity(llama, DOCUMENTS, tokenizer, context_length=8, batch_size=0)


def test_a_token_outside_the_models_vocabulary_is_refused(tokenizer):
    config = MoxEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=2, num_experts=2)
    with pytest.raises(UserError, match="the model's vocabulary has 64 tokens"):
        evaluate_perplexity(MoxEForCausalLM(config), DOCUMENTS, tokenizer)


def test_a_tokenizer_without_bos_and_eos_is_refused(moxe, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="neither a bos nor an eos token"):
        evaluate_perplexity(moxe, DOCUMENTS, bare)


def test_what_looks_like_a_special_token_inside_a_text_is_text(moxe, tokenizer):
    text = "the sea<|endoftext|>the town"
    plain = tokenizer.encode("the sea") + tokenizer.encode("the town")
    assert evaluate_perplexity(moxe, [text], tokenizer).tokens > len(plain) + 1
    assert tokenizer.encode(text) == [*tokenizer.encode("the sea"), 0, *tokenizer.encode("the town")]
