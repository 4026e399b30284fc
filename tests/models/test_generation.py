"""`generate` of transformers on a recurrent state: greedy, sampling, beams, padding, going on from a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from moxe.models.cache import MoxECache
from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import EXPERT_KINDS, EXPERT_MEMORIES, tiny_model, token_ids
from tests.modules.comparison import assert_equal

NEW = 8
PAD = 39  # of no prompt here: without a mask, generate takes padding tokens in a prompt for padding


def prompts(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return token_ids(rows, tokens, seed, vocab_size=PAD)


def generate(model: Any, ids: Tensor, **settings: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **settings})


@torch.no_grad()
def greedy_by_full_forwards(model: MoxEForCausalLM, ids: Tensor, new: int = NEW) -> Tensor:
    """Without any state: the whole text again for each token."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    ("expert_kind", "expert_memory"),
    [(kind, "sequence") for kind in EXPERT_KINDS] + [("xlstm", EXPERT_MEMORIES[1])],
)
def test_greedy_generation_equals_the_argmax_of_full_forward_passes(expert_kind: str, expert_memory: str):
    model, ids = tiny_model(expert_kind=expert_kind, expert_memory=expert_memory), prompts(2, 5)
    expected = greedy_by_full_forwards(model, ids)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    assert len(expected[:, 5:].unique()) > 2


def test_each_step_of_generation_runs_the_model_on_one_token():
    model, widths = tiny_model(), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].numel()))
    generate(model, prompts(2, 5))
    assert widths == [10, *[2] * (NEW - 1)]


def test_sampling_is_decided_by_the_seed():
    model, ids = tiny_model(), prompts(2, 5)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, temperature=1.5, top_k=20, top_p=0.95)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_equal_beams_without_a_state(beams: int):
    """The state of a beam is carried with it whenever beams are reordered."""
    model, ids = tiny_model(), prompts(2, 5)
    with_state = generate(model, ids, num_beams=beams)
    assert torch.equal(with_state, generate(model, ids, num_beams=beams, use_cache=False))
    assert not torch.equal(with_state, generate(model, ids))


def test_all_beams_of_a_prompt_can_be_returned():
    model, ids = tiny_model(), prompts(2, 5)
    settings = {"num_beams": 4, "num_return_sequences": 3}
    out = generate(model, ids, **settings)
    assert out.shape == (6, 5 + NEW)
    assert torch.equal(out, generate(model, ids, use_cache=False, **settings))


def test_several_samples_of_a_prompt():
    model, ids = tiny_model(), prompts(2, 5)
    torch.manual_seed(0)
    out = generate(model, ids, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 5 + NEW)
    assert torch.equal(out[:, :5], ids.repeat_interleave(3, 0))
    assert len(out[:3].unique(dim=0)) == 3


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_a_batch_with_left_padding_equals_each_prompt_alone(settings: dict[str, Any]):
    model, lengths, width = tiny_model(), (6, 2, 4), 6
    ids = prompts(3, width)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    batch = generate(model, ids.masked_fill(mask == 0, PAD), attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, width - length :], **settings)
        assert torch.equal(batch[row, width - length :], alone[0])


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_generation_after_packed_documents_goes_on_in_the_last_of_them(settings: dict[str, Any]):
    model, ids = tiny_model(), prompts(2, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 0, 0, 0]])
    out = generate(model, ids, document_ids=documents, **settings)
    for row, first in enumerate((3, 5)):
        assert torch.equal(out[row, first:], generate(model, ids[row : row + 1, first:], **settings)[0])
    assert not torch.equal(out, generate(model, ids, **settings))


def test_generation_stops_at_the_end_token_and_pads_what_follows():
    model, ids = tiny_model(), prompts(2, 5)
    free = generate(model, ids)
    end = int(free[0, 5 + 2])
    stopped = generate(model, ids, eos_token_id=end)
    for row in range(2):
        new = free[row, 5:].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        width = stopped.shape[1] - 5
        assert stopped[row, 5:].tolist() == (kept + [PAD] * width)[:width]


@pytest.mark.parametrize("name", ["cache_params", "past_key_values"])
def test_generation_goes_on_from_a_returned_state(name: str):
    model, ids = tiny_model(), prompts(2, 5)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, MoxECache)
    # The last token of a generation has not been read yet.
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    longer = generate(model, first.sequences, max_new_tokens=4, **{name: cache})
    assert torch.equal(longer, greedy_by_full_forwards(model, ids))
    assert cache.get_seq_length() == longer.shape[1] - 1


def test_a_conversation_goes_on_with_more_text_after_a_returned_state():
    """And reads the new text alone."""
    model, ids, more = tiny_model(), prompts(1, 5), prompts(1, 3, seed=4)
    first = generate(model, ids, return_dict_in_generate=True)
    prompt = torch.cat([first.sequences, more], 1)
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].numel()))
    out = generate(model, prompt, cache_params=first.past_key_values)
    assert widths == [1 + 3, *[1] * (NEW - 1)]
    assert torch.equal(out, greedy_by_full_forwards(model, prompt))


def test_a_state_that_has_seen_the_whole_prompt_is_refused():
    model, ids = tiny_model(), prompts(1, 5)
    cache = model(ids).cache_params
    with pytest.raises(ValueError, match="cache_params has already seen every token of input_ids"):
        generate(model, ids, cache_params=cache)


def test_tokens_are_streamed_one_by_one():
    seen: list[list[int]] = []

    class Recorder(BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    model, ids = tiny_model(), prompts(1, 5)
    out = generate(model, ids, streamer=Recorder())
    assert seen == [ids[0].tolist(), *([token] for token in out[0, 5:].tolist()), []]
    assert issubclass(TextStreamer, BaseStreamer)


def test_drafted_tokens_can_not_be_taken_back_so_assisted_generation_is_refused():
    model, ids = tiny_model(), prompts(1, 5)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids, assistant_model=tiny_model(seed=1))


def test_scores_are_the_logits_of_a_full_forward_pass():
    model, ids = tiny_model(), prompts(2, 5)
    out = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(out.sequences).logits[:, 4:-1].float()
    assert_equal(torch.stack(out.logits, 1), whole)
