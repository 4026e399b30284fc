"""Generation against plain loops over the model's own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from moxe.errors import UserError
from moxe.evaluation.generation import generate_text

PROMPT = "the old man"


@torch.no_grad()
def greedy_by_loop(model, tokenizer, prompt, count):
    tokens = tokenizer.encode(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def test_temperature_zero_takes_the_most_probable_token_each_time(model, tokenizer):
    expected = tokenizer.decode(greedy_by_loop(model, tokenizer, PROMPT, 12))
    assert generate_text(model, tokenizer, PROMPT, max_new_tokens=12, temperature=0) == expected


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    texts = [generate_text(model, tokenizer, PROMPT, max_new_tokens=12, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_seed_leaves_the_callers_random_state_as_it_was(moxe, tokenizer):
    before = torch.get_rng_state()
    generate_text(moxe, tokenizer, PROMPT, max_new_tokens=3, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_seed_the_callers_random_state_is_used(moxe, tokenizer):
    with torch.random.fork_rng():
        texts = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            texts.append(generate_text(moxe, tokenizer, PROMPT, max_new_tokens=12, temperature=2.0))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("narrowed", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_narrowed_to_one_token_is_greedy(moxe, tokenizer, narrowed):
    greedy = generate_text(moxe, tokenizer, PROMPT, max_new_tokens=12, temperature=0)
    assert generate_text(moxe, tokenizer, PROMPT, max_new_tokens=12, seed=0, **narrowed) == greedy


@torch.no_grad()
def test_top_k_keeps_to_the_k_most_probable_tokens_and_no_top_k_does_not(moxe, tokenizer):
    logits = moxe(input_ids=torch.tensor([tokenizer.encode(PROMPT)])).logits[0, -1]
    likely = {tokenizer.decode(token) for token in logits.topk(3).indices}
    options = {"max_new_tokens": 1, "temperature": 50.0}
    narrow = {generate_text(moxe, tokenizer, PROMPT, seed=seed, top_k=3, **options) for seed in range(12)}
    assert narrow <= likely
    assert len(narrow) > 1
    # At so high a temperature the whole vocabulary is drawn from, also beyond the library's default of 50 tokens.
    beyond = {tokenizer.decode(token) for token in logits.topk(60).indices}
    free = {generate_text(moxe, tokenizer, PROMPT, seed=seed, **options) for seed in range(12)}
    assert free - beyond


@torch.no_grad()
def test_beam_search_as_wide_as_the_vocabulary_finds_the_best_two_tokens(moxe, tokenizer):
    prompt, vocab_size, eos = tokenizer.encode(PROMPT), moxe.config.vocab_size, tokenizer.eos_token_id
    first = moxe(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    pairs = torch.tensor([[*prompt, token] for token in range(vocab_size)])
    both = first[:, None] + moxe(input_ids=pairs).logits[:, -1].log_softmax(-1)
    assert first[eos] < both.max() / 2  # a score is a mean over tokens: ending at once is not the best
    best = divmod(int(both.argmax()), vocab_size)
    text = generate_text(moxe, tokenizer, PROMPT, max_new_tokens=2, num_beams=vocab_size)
    assert text == tokenizer.decode(best)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2.0, "seed": 3}])
def test_streamed_pieces_together_are_the_text(model, tokenizer, options):
    pieces = []
    text = generate_text(model, tokenizer, PROMPT, max_new_tokens=25, streamer=pieces.append, **options)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(pieces)


def test_beam_search_hands_its_text_over_once_at_the_end(moxe, tokenizer):
    pieces = []
    text = generate_text(moxe, tokenizer, PROMPT, max_new_tokens=5, num_beams=3, streamer=pieces.append)
    assert pieces == [text]


def test_generation_stops_at_the_end_of_text_token(moxe, tokenizer):
    tokens = greedy_by_loop(moxe, tokenizer, PROMPT, 30)
    # Any token serves as the end of a text, if making it special leaves the prompt's tokens as they are.
    stop = next(token for token in tokens[1:] if token != tokens[0] and tokenizer.decode(token) not in PROMPT)
    stopping = type(tokenizer)(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token=tokenizer.convert_ids_to_tokens(stop)
    )
    expected = tokenizer.decode(tokens[: tokens.index(stop)])
    assert generate_text(moxe, stopping, PROMPT, max_new_tokens=30, temperature=0) == expected


def test_a_training_model_generates_in_evaluation_mode_and_trains_on_afterwards(moxe, tokenizer):
    expected = generate_text(moxe, tokenizer, PROMPT, max_new_tokens=5, temperature=0)
    moxe.train()
    try:
        assert generate_text(moxe, tokenizer, PROMPT, max_new_tokens=5, temperature=0) == expected
        assert moxe.training
    finally:
        moxe.eval()


def test_an_empty_prompt_is_refused(moxe, tokenizer):
    with pytest.raises(UserError, match="prompt is empty"):
        generate_text(moxe, tokenizer, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": 5, "temperature": 0}, "top_k=5 chooses what to sample from"),
        ({"top_p": 0.5, "num_beams": 2}, "top_p=0.5 chooses what to sample from"),
    ],
)
def test_options_out_of_range_are_refused(moxe, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        generate_text(moxe, tokenizer, PROMPT, **options)


def test_a_prompt_with_a_token_outside_the_vocabulary_is_refused(moxe, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    with pytest.raises(UserError, match="the model's vocabulary has"):
        generate_text(moxe, larger, "the <new>")


def test_a_prompt_gets_no_special_tokens_around_it(moxe, tokenizer):
    wrapped = copy.deepcopy(tokenizer)
    ends = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    wrapped.backend_tokenizer.post_processor = ends
    assert wrapped.encode("the sea")[-1] == 0
    options = {"max_new_tokens": 5, "temperature": 0.0}
    assert generate_text(moxe, wrapped, "the sea", **options) == generate_text(moxe, tokenizer, "the sea", **options)
