"""Log-probabilities of given tokens under a causal language model, in batches of rows of unequal length.

Legend: B rows of a batch, T tokens of one row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moxe.errors import UserError


@dataclass(frozen=True)
class Row:
    """Tokens [T] of which the last `num_targets` are scored, each given all tokens before it; T > num_targets."""

    tokens: Tensor
    num_targets: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_targets < len(self.tokens):
            raise ValueError(f"num_targets={self.num_targets} must be from 1 to {len(self.tokens) - 1}")


@dataclass(frozen=True)
class Score:
    """Log-likelihood in nats of a row's targets, and whether each of them is the most probable token at its place."""

    log_likelihood: float
    is_greedy: bool
    num_targets: int


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text's first token: bos, else eos (as lm-evaluation-harness chooses)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise UserError("the tokenizer has neither a bos nor an eos token, so a text's first token cannot be predicted")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` alone: no special tokens around it, and what looks like one inside it is text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def check_vocabulary(model: PreTrainedModel, tokens: Sequence[Tensor]) -> None:
    """Refuse token ids that the model has no embedding for."""
    vocab_size = model.config.get_text_config().vocab_size
    largest = max((int(row.max()) for row in tokens if len(row)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary has {vocab_size} tokens: use the "
            "tokenizer the model was trained with"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can attend to; None for a recurrent model, which has no such bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def exponential(value: float) -> float:
    """exp, with infinity instead of an OverflowError: a diverged model's perplexity is a result, not a crash."""
    return math.inf if value > 700 else math.exp(value)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal if `shown`; gives the function that advances it by so many of `total`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def target_scores(logits: Tensor, targets: Tensor) -> tuple[float, bool]:
    """Summed log-probability of `targets` [T] under `logits` [T, V], and whether all are the argmax.

    One row at a time in float32, so that no second [B, T, V] tensor is made beside the logits.
    """
    log_likelihood = -F.cross_entropy(logits.float(), targets, reduction="none").double().sum().item()
    return log_likelihood, bool((logits.argmax(dim=-1) == targets).all())


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int,
    progress: bool = False,
    description: str = "scoring",
) -> list[Score]:
    """Score every row, in the order given; rows of like length share a batch.

    Args:
        model: any causal language model of transformers whose forward takes `attention_mask` and `logits_to_keep`.
        rows: what to score; a row longer than the model's positions is cut from the left, as lm-evaluation-harness
            does, so its targets are always scored.
        batch_size: rows a forward.
        progress: show a progress bar that counts rows.

    Raises:
        UserError: a token id outside the model's vocabulary, a batch size below 1, more targets than positions.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    check_vocabulary(model, [row.tokens for row in rows])
    rows = [_cut_to_positions(row, max_positions(model)) for row in rows]
    # Longest first: the largest batch comes first, so memory that does not suffice shows at once.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens), reverse=True)
    scores: dict[int, Score] = {}
    with evaluation_mode(model), progress_bar(description, len(rows), shown=progress) as advance:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            scores.update(zip(indices, _score_batch(model, [rows[index] for index in indices]), strict=True))
            advance(len(indices))
    return [scores[index] for index in range(len(rows))]


def _cut_to_positions(row: Row, positions: int | None) -> Row:
    if positions is None:
        return row
    if row.num_targets > positions:
        raise UserError(f"{row.num_targets} tokens to score are more than the model's {positions} positions")
    return Row(row.tokens[-(positions + 1) :], row.num_targets)


def _score_batch(model: PreTrainedModel, rows: list[Row]) -> list[Score]:
    inputs = [row.tokens[:-1] for row in rows]  # the last token is only ever predicted
    input_ids, attention_mask = pad_right(inputs, model.device)
    # Only the positions from the first scored one on meet the head, whose logits are most of the memory.
    first_kept = min(len(row_inputs) - row.num_targets for row_inputs, row in zip(inputs, rows, strict=True))
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        logits_to_keep=input_ids.shape[1] - first_kept,
    ).logits  # [B, T - first_kept, V]
    scores = []
    for row_logits, row_inputs, row in zip(logits, inputs, rows, strict=True):
        end = len(row_inputs) - first_kept
        targets = row.tokens[-row.num_targets :].to(logits.device)
        scores.append(Score(*target_scores(row_logits[end - row.num_targets : end], targets), row.num_targets))
    return scores


def pad_right(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, both int64 [B, T]; mask 0 marks the padding, which is token 0."""
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids.to(device), attention_mask.to(device)
