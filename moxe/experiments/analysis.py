"""`moxe analyse`: a model reads a text, and what its routers decide is analysed.

Legend: B windows side by side, S tokens of a chunk, E experts, K experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moxe.errors import UserError
from moxe.evaluation.perplexity import CHUNK_LENGTH
from moxe.evaluation.scoring import (
    check_vocabulary,
    encode,
    evaluation_mode,
    pad_right,
    progress_bar,
    start_token_id,
)
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.modules.router import RouterOutput
from moxe.observability.analysis import MINIMUM_TOKENS, RoutingAnalysis, analyse_tokens
from moxe.observability.routing import combine_routing

# More than tokens of text have on average, so that of a huge document only the beginning is made into tokens.
CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True, eq=False)
class _Window:
    """Tokens that the model reads from an empty state; the last one is only predicted."""

    document: int
    tokens: Tensor
    begins_document: bool  # then the first token is the start token, which is no token of the text


@dataclass(frozen=True, eq=False)
class _Chunk:
    """What the model made of T consecutive tokens of a window."""

    window: int
    begin: int
    token_ids: Tensor  # [T]
    losses: Tensor  # [T] of the next token
    routing: tuple[RouterOutput, ...]  # L of [T]


def analyse_routing(
    model: PreTrainedModel,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 20_000,
    context_length: int | None = None,
    token_counts: Mapping[int, int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> RoutingAnalysis:
    """Whether the routing of a MoxE model does on these documents what the theory says.

    Counted is each token of a document that has a next one. The model reads the bos (else eos) token before a
    document's first token, as in `evaluate_perplexity`.

    Args:
        model: the MoxE model.
        documents: the texts, read until there are `max_tokens` tokens; empty ones count for nothing.
        tokenizer: the one the model was trained with.
        max_tokens: how many tokens to count at most.
        context_length: tokens after which the model begins anew, as in its training rows; None: it reads each document
            as a whole, with its state carried.
        token_counts: how often each token id occurs in the training corpus, for the rarity of the tokens; None: the
            analysed text itself says how rare they are.
        batch_size: documents or windows a forward; it does not change the result.
        seed: of the resampling behind the intervals.
        progress: show a progress bar.

    Raises:
        UserError: a model without a router; no or too little text; a token outside the model's vocabulary; numbers out
            of range; a model that has diverged.
    """
    if not isinstance(model, MoxEForCausalLM) or not isinstance(model.config, MoxEConfig):
        raise UserError(f"{type(model).__name__} has no router to analyse: a MoxEForCausalLM is needed")
    if max_tokens < MINIMUM_TOKENS:
        raise UserError(f"{max_tokens} tokens are too few for intervals: choose at least {MINIMUM_TOKENS}")
    for name, value in (("batch_size", batch_size), ("context_length", context_length)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    windows = list(_windows(documents, tokenizer, max_tokens, context_length))
    if not windows:
        raise UserError("there is no text to analyse: no document has two tokens")
    counted = sum(len(window.tokens) - 1 - window.begins_document for window in windows)
    if counted < MINIMUM_TOKENS:  # before the model takes its time
        raise UserError(f"the text gives {counted} tokens to analyse, but at least {MINIMUM_TOKENS} are needed")
    check_vocabulary(model, [window.tokens for window in windows])
    chunks = sorted(_read(model, windows, batch_size, progress), key=lambda chunk: (chunk.window, chunk.begin))
    return analyse_tokens(
        [combine_routing(parts, torch.cat) for parts in zip(*(chunk.routing for chunk in chunks), strict=True)],
        torch.cat([chunk.losses for chunk in chunks]),
        torch.cat([chunk.token_ids for chunk in chunks]),
        torch.cat([torch.full_like(chunk.token_ids, windows[chunk.window].document) for chunk in chunks]),
        config=model.config,
        context_length=context_length,
        token_counts=token_counts,
        seed=seed,
    )


def _windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, context_length: int | None
) -> Iterator[_Window]:
    """The documents until `max_tokens` tokens are counted, cut where the model begins anew."""
    start = start_token_id(tokenizer)
    left = max_tokens
    for number, document in enumerate(documents):
        tokens = encode(tokenizer, document[: CHARACTERS_A_TOKEN * (left + 1)])[: left + 1]
        if len(tokens) < 2:
            continue
        sequence = torch.tensor([start, *tokens])
        length = context_length or len(sequence)
        for begin in range(0, len(sequence) - 1, length):
            yield _Window(number, sequence[begin : begin + length + 1], begins_document=begin == 0)
        left -= len(tokens) - 1
        if not left:
            return


def _read(model: MoxEForCausalLM, windows: list[_Window], batch_size: int, progress: bool) -> Iterator[_Chunk]:
    """Chunks of all windows, windows of like length side by side; the start token of a document is left out."""
    by_length = sorted(range(len(windows)), key=lambda index: len(windows[index].tokens), reverse=True)
    total = sum(len(window.tokens) - 1 for window in windows)
    with evaluation_mode(model), progress_bar("reading", total, shown=progress) as advance:
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            state = None
            for begin in range(0, len(windows[batch[0]].tokens) - 1, CHUNK_LENGTH):
                rows = [windows[index].tokens[begin : begin + CHUNK_LENGTH + 1] for index in batch]
                input_ids, attention_mask = pad_right([row[:-1] for row in rows], model.device)
                output = model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    cache_params=state,
                    use_cache=True,
                    output_router_logits=True,
                )
                state = output.cache_params
                for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
                    here = slice(int(begin == 0 and windows[index].begins_document), len(row) - 1)
                    if here.start < here.stop:
                        yield _Chunk(
                            window=index,
                            begin=begin,
                            token_ids=row[:-1][here],
                            losses=_losses(output.logits[place, here], row[1:][here]),
                            routing=tuple(_tokens_of(layer, place, here) for layer in output.routing),
                        )
                advance(sum(max(0, len(row) - 1) for row in rows))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu()


def _tokens_of(layer: RouterOutput, row: int, columns: slice) -> RouterOutput:
    """The tokens [T] in some columns of one row of a layer's routing [B, S], on the CPU."""
    return combine_routing([layer], lambda parts: parts[0][row, columns].cpu())
