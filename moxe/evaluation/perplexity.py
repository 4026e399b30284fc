"""Perplexity and bits a byte of documents.

Legend: B documents side by side, S tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moxe.errors import UserError
from moxe.evaluation.scoring import (
    Row,
    Score,
    check_vocabulary,
    encode,
    evaluation_mode,
    exponential,
    max_positions,
    pad_right,
    progress_bar,
    score_rows,
    start_token_id,
    target_scores,
)
from moxe.models.modeling_moxe import MoxEForCausalLM

CHUNK_LENGTH = 256
"""Tokens of each document a forward takes when the state is carried; it bounds the memory, not the result."""


@dataclass(frozen=True)
class PerplexityResult:
    """What a model makes of some documents.

    Args:
        loss: mean negative log-likelihood, nats a token, over all tokens of all documents.
        perplexity: exp(loss).
        bits_per_byte: the same sum in bits over the documents' UTF-8 bytes, so that tokenizers can be compared.
        tokens: how many tokens were predicted: every token of every document, the first one included.
        bytes: UTF-8 bytes of the documents.
        documents: how many documents held at least one token.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate_perplexity(
    model: PreTrainedModel,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> PerplexityResult:
    """Token-weighted perplexity and bits a byte of `documents`, each on its own.

    The first token of a document is predicted from the bos (else eos) token, so every byte is accounted for; no end
    of document is predicted. With `context_length=None` a MoxE model reads each document from its first token to its
    last, chunk by chunk, with its state carried. With a number, any causal language model reads windows of that many
    tokens: they are those of lm-evaluation-harness (`loglikelihood_rolling`), disjoint in what they predict, each
    starting one token before, the last one reaching back to its full length.

    Args:
        model: a MoxE model, or any causal language model of transformers if `context_length` is given.
        documents: the texts; empty ones count for nothing. Their tokens are held in memory.
        tokenizer: the one the model was trained with.
        context_length: tokens a window; None for the whole document.
        batch_size: documents or windows a forward; it does not change the result.
        progress: show a progress bar.

    Raises:
        UserError: nothing to predict; `context_length` missing for a model without a recurrent state, or more than
            its positions; a token outside the model's vocabulary; a batch size or context length below 1.
    """
    _check_options(model, context_length, batch_size)
    documents = [document for document in documents if document]
    scores = score_windows(
        model, documents, tokenizer, context_length=context_length, batch_size=batch_size, progress=progress
    )
    return summarise_windows(scores, documents)


def summarise_windows(scores: Sequence[Score], documents: Sequence[str]) -> PerplexityResult:
    """Perplexity and bits a byte of what `score_windows` gave for these documents."""
    num_tokens = sum(score.num_targets for score in scores)
    total = -math.fsum(score.log_likelihood for score in scores)
    loss = total / num_tokens
    return PerplexityResult(
        loss=loss,
        perplexity=exponential(loss),
        bits_per_byte=total / math.log(2) / sum(len(document.encode()) for document in documents),
        tokens=num_tokens,
        bytes=sum(len(document.encode()) for document in documents),
        documents=sum(1 for document in documents if document),
    )


def score_windows(
    model: PreTrainedModel,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Score]:
    """The score of each window of `evaluate_perplexity`, in the order of the documents and of their text.

    Window by window two models can be compared as a pair. With `context_length=None` a window is what a forward takes,
    `CHUNK_LENGTH` tokens, so its targets are those of the window that `context_length=CHUNK_LENGTH` has in its place:
    a model whose state is carried pairs with one that sees the window alone.

    Args, Raises: as `evaluate_perplexity`.
    """
    _check_options(model, context_length, batch_size)
    start = start_token_id(tokenizer)
    sequences = [torch.tensor([start, *tokens]) for document in documents if (tokens := encode(tokenizer, document))]
    if not sequences:
        raise UserError("there is no text to evaluate: all documents are empty")
    if context_length is None:
        return _score_with_state(model, sequences, batch_size, progress)
    rows = [row for sequence in sequences for row in _windows(sequence, context_length)]
    return score_rows(model, rows, batch_size=batch_size, progress=progress, description="perplexity")


def _check_options(model: PreTrainedModel, context_length: int | None, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if context_length is None:
        if not isinstance(model, MoxEForCausalLM):
            raise UserError(f"context_length is needed for {type(model).__name__}, which carries no recurrent state")
        return
    if context_length < 1:
        raise UserError(f"context_length={context_length} must be at least 1")
    positions = max_positions(model)
    if positions is not None and context_length > positions:
        raise UserError(f"context_length={context_length} is more than the model's {positions} positions")


def _windows(sequence: Tensor, context_length: int) -> Iterator[Row]:
    """Rows of at most `context_length` inputs that together predict each token of `sequence` but the first, once."""
    predicted, num_tokens = 0, len(sequence) - 1
    while predicted < num_tokens:
        end = min(predicted + context_length, num_tokens)
        yield Row(sequence[max(0, end - context_length) : end + 1], num_targets=end - predicted)
        predicted = end


def _score_with_state(model: PreTrainedModel, sequences: list[Tensor], batch_size: int, progress: bool) -> list[Score]:
    """All chunks of all sequences, in their order; sequences of like length go side by side."""
    check_vocabulary(model, sequences)
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    total = sum(len(sequence) - 1 for sequence in sequences)
    scores: list[list[Score]] = [[] for _ in sequences]
    with evaluation_mode(model), progress_bar("perplexity", total, shown=progress) as advance:
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            state = None
            for begin in range(0, len(sequences[batch[0]]) - 1, CHUNK_LENGTH):
                chunks = [sequences[index][begin : begin + CHUNK_LENGTH + 1] for index in batch]
                input_ids, attention_mask = pad_right([chunk[:-1] for chunk in chunks], model.device)
                output = model(input_ids=input_ids, attention_mask=attention_mask, cache_params=state, use_cache=True)
                state = output.cache_params
                for index, logits, chunk in zip(batch, output.logits, chunks, strict=True):
                    num_targets = len(chunk) - 1
                    if num_targets > 0:
                        of_chunk = target_scores(logits[:num_targets], chunk[1:].to(logits.device))
                        scores[index].append(Score(*of_chunk, num_targets))
                        advance(num_targets)
    return [score for of_sequence in scores for score in of_sequence]
