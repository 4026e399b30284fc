"""LAMBADA's measures: how well a model predicts the last word of a text.

The definition is that of lm-evaluation-harness for its task `lambada_openai`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moxe.errors import UserError
from moxe.evaluation.scoring import Row, Score, encode, exponential, score_rows, start_token_id

LAMBADA = {"source": "EleutherAI/lambada_openai", "subset": "default", "split": "test"}
"""Where the hub keeps the 5,153 texts of `lambada_openai`, in the words of `moxe.data.sources.read_documents`."""


@dataclass(frozen=True)
class LastWordResult:
    """How well the last words were predicted.

    Args:
        last_word_perplexity: exp(-mean over the examples of the log-likelihood of all tokens of the last word).
        last_word_accuracy: share of the examples in which every token of the last word is the most probable one.
        examples: how many texts.
        last_token_perplexity: exp(-mean over the last words' tokens of their log-likelihood): steadier than the
            perplexity of words when a model is weak, since a word of many tokens counts as many.
        tokens: how many tokens the last words have together.
    """

    last_word_perplexity: float
    last_word_accuracy: float
    examples: int
    last_token_perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate_last_word(
    model: PreTrainedModel,
    examples: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> LastWordResult:
    """Perplexity and accuracy of the last word of each text, as `score_last_words` scores them.

    Raises:
        UserError: no example, and what `score_last_words` refuses.
    """
    return summarise_last_words(score_last_words(model, examples, tokenizer, batch_size=batch_size, progress=progress))


def summarise_last_words(scores: Sequence[Score]) -> LastWordResult:
    """Perplexity and accuracy of what `score_last_words` gave.

    Raises:
        UserError: for no score.
    """
    if not scores:
        raise UserError("there is no example to evaluate")
    total = math.fsum(score.log_likelihood for score in scores)
    tokens = sum(score.num_targets for score in scores)
    return LastWordResult(
        last_word_perplexity=exponential(-total / len(scores)),
        last_word_accuracy=sum(score.is_greedy for score in scores) / len(scores),
        examples=len(scores),
        last_token_perplexity=exponential(-total / tokens),
        tokens=tokens,
    )


def score_last_words(
    model: PreTrainedModel,
    examples: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Score]:
    """Log-likelihood of each text's last word given the rest, in the order given (for paired comparisons of models).

    The last word is what follows the last space, with that space. Texts of like length share a batch, and the head
    works only where a last word is predicted.

    Args:
        model: any causal language model of transformers; texts beyond its positions lose their left end.
        examples: the texts.
        tokenizer: the one the model was trained with.
        batch_size: texts a forward; it does not change the result.
        progress: show a progress bar.

    Raises:
        UserError: a text that is empty or ends in a space (with its number, counted from 1), a token outside the
            model's vocabulary, a batch size below 1.
    """
    rows = []
    for number, text in enumerate(examples, start=1):
        context, _, word = text.rpartition(" ")
        if not word:
            raise UserError(f"example {number} has no last word: {text[-40:]!r} is empty or ends in a space")
        # A text of one word has no space to put before it in the text, but it is scored as " word" all the same.
        rows.append(_encode_pair(tokenizer, context, " " + word))
    return score_rows(model, rows, batch_size=batch_size, progress=progress, description="last words")


def _encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Row:
    """The tokens of `context` and those that `continuation` adds to them (lm-evaluation-harness, `_encode_pair`).

    White space at the end of the context goes to the continuation, because tokens of " word" begin with the space;
    the continuation's tokens are those of the whole behind as many as the context has by itself.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return _row([start_token_id(tokenizer)], encode(tokenizer, continuation), continuation)
    context_ids = encode(tokenizer, stripped)
    return _row(context_ids, encode(tokenizer, stripped + continuation)[len(context_ids) :], continuation)


def _row(context_ids: Sequence[int], continuation_ids: Sequence[int], continuation: str) -> Row:
    if not continuation_ids:
        raise UserError(f"the tokenizer gives no token for the last word {continuation!r} behind its context")
    return Row(torch.tensor([*context_ids, *continuation_ids]), num_targets=len(continuation_ids))
