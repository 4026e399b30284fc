"""Text that goes on from a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moxe.errors import UserError
from moxe.evaluation.scoring import check_vocabulary, evaluation_mode


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int | None = None,
    streamer: Callable[[str], None] | None = None,
) -> str:
    """The model's continuation of `prompt`, without the prompt and without special tokens.

    Args:
        model: any causal language model of transformers.
        tokenizer: the one the model was trained with.
        prompt: at least one character.
        max_new_tokens: how many tokens at most; an eos token ends the text before.
        temperature: divides the logits; 0 takes the most probable token each time. None: 1 (sampling from the
            model's own distribution) with one beam, 0 (beam search) with several.
        top_k: sample among the k most probable tokens only; None for all.
        top_p: sample among the fewest tokens whose probabilities reach this sum; None for all.
        num_beams: beams of a beam search.
        seed: makes sampling repeatable; the caller's random state is left as it was. None: the caller's state is used.
        streamer: is called with each piece of new text as it comes; the pieces together are the text returned. With
            several beams nothing is certain before the end, so it is called once.

    Raises:
        UserError: an empty prompt, an option out of range, `top_k` or `top_p` where nothing is sampled, a token
            outside the model's vocabulary.
    """
    if temperature is None:
        temperature = 1.0 if num_beams == 1 else 0.0
    _check_options(max_new_tokens, temperature, top_k, top_p, num_beams)
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    if not tokens:
        raise UserError("the prompt is empty: give at least one character to go on from")
    input_ids = torch.tensor([tokens])
    check_vocabulary(model, [input_ids[0]])
    sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=temperature > 0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id,
        **(sampling if temperature > 0 else {}),
    )
    pieces = _PieceStreamer(tokenizer, streamer) if streamer is not None and num_beams == 1 else None
    with evaluation_mode(model), _seeded(seed, model.device):
        output: Tensor = cast(Any, model).generate(
            input_ids=input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids).to(model.device),
            generation_config=config,
            streamer=pieces,
        )
    new_tokens = output[0, len(tokens) :]
    text = cast(str, tokenizer.decode(new_tokens, skip_special_tokens=True))
    if streamer is not None and pieces is None:
        streamer(text)
    return text


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_beams: int
) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if num_beams < 1:
        raise UserError(f"num_beams={num_beams} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} must be a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise UserError(f"{name}={value} chooses what to sample from, but nothing is sampled at temperature 0")


class _PieceStreamer(TextStreamer):
    """Hands finished pieces of the new text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_piece: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_piece = on_piece

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_piece(text)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
