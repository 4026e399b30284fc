"""`moxe explore`: a model reads a text, and every decision of its routers is kept for the page.

Legend: N tokens of the text, V vocabulary, T tokens of a chunk, K experts a token, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moxe.data.sources import BUILTIN, read_documents
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
from moxe.experiments import MOST_TOKENS
from moxe.experiments.analysis import CHARACTERS_A_TOKEN
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.analysis import finite_array
from moxe.observability.estimates import Ints
from moxe.observability.explorer.exploration import (
    NEXT_TOKENS,
    Exploration,
    ReadText,
    RoutedCorpus,
    explore_read_text,
    pieces_of,
)
from moxe.observability.memory import memory_of_experts, record_memory
from moxe.observability.routing import combine_routing
from moxe.recipe import load_recipe
from moxe.training.checkpoint import RECIPE

CORPUS_TOKENS = 1_000_000
"""Of the corpus that say how rare a token is: as many as a second's reading gives."""
ROUTED_TOKENS = 20_000
"""Of those that the model reads, spread evenly, to see what its experts like."""
_PASSAGE = 512
_PASSAGES_AT_ONCE = 8
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece writes it


def explore(
    model: PreTrainedModel,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    corpus: Iterable[str] | None = None,
    corpus_name: str = "the text itself",
    max_tokens: int | None = None,
    progress: bool = False,
) -> Exploration:
    """What the page of `moxe explore` shows of a MoxE model over a text.

    The model reads the bos (else eos) token before the text's first token, and the text with its state carried.

    Args:
        model: the MoxE model.
        text: what it reads.
        tokenizer: the one the model was trained with.
        name: of the model, for a reader of the page.
        corpus: documents that say how rare a token is and what an expert likes: the first `CORPUS_TOKENS` tokens of
            them. None: the text itself says so.
        corpus_name: what the corpus is, for a reader of the page.
        max_tokens: show the first so many tokens of a longer text; None: a text of more than 20,000 is refused.
        progress: show a progress bar.

    Raises:
        UserError: a model without MoxE's router; an empty text; one that is too long; a token outside the model's
            vocabulary; a model that has diverged.
    """
    if not isinstance(model, MoxEForCausalLM) or not isinstance(model.config, MoxEConfig):
        raise UserError(
            f"{name} is a {type(model).__name__}, which has no entropy-aware router: only a MoxE model can be explored"
        )
    pieces, tokens = _tokens_of(text, tokenizer, max_tokens)
    start = torch.tensor([start_token_id(tokenizer)])
    check_vocabulary(model, [start, tokens])
    passages = [] if corpus is None else _passages(corpus, tokenizer)
    check_vocabulary(model, passages)
    if corpus is not None and not passages:
        raise UserError(f"{corpus_name} has no token, so it cannot say how rare a token is")
    routed = _spread(passages)
    total = sum(map(len, [tokens, *routed]))
    with evaluation_mode(model), progress_bar("reading", total, shown=progress) as advance:
        read = _read(model, torch.cat([start, tokens]), pieces, advance)
        experts = _route(model, [torch.cat([start, passage]) for passage in routed], advance)
    if corpus is None:
        passages = routed = [tokens]
        experts = [layer.expert_indices.numpy() for layer in read.routing]
    return explore_read_text(
        name,
        model.config,
        read,
        RoutedCorpus(
            name=corpus_name,
            counts=Counter(torch.cat(passages).tolist()),
            token_ids=torch.cat(routed).numpy(),
            experts=experts,
        ),
        decode=lambda token_id: _decode(tokenizer, token_id),
    )


def read_text(path: str | Path) -> str:
    """The text of a file, as the documents of data are read: without a byte order mark, Windows' line breaks, and line
    breaks around it.

    Raises:
        UserError: if it cannot be read, or is not UTF-8.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is no text: it is not valid UTF-8 at byte {error.start}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user that is not there
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"the text {str(path)!r} cannot be read: {reason}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")


def corpus_of_run(checkpoint: str | Path) -> dict[str, Any]:
    """The documents that a run was trained on, as the arguments of `explore`; none unless it was the built-in corpus.

    A recipe may come with a checkpoint from elsewhere, so no file that it names is read.
    """
    path = Path(checkpoint).expanduser() / RECIPE
    try:
        recipe = load_recipe(path) if path.is_file() else None
    except UserError:  # of another version, or damaged; it is not what the user asked about
        recipe = None
    if recipe is None or recipe.data.source != BUILTIN:
        return {}
    documents = read_documents(
        BUILTIN, text_field=recipe.data.text_field, document_separator=recipe.data.document_separator
    )
    return {"corpus": documents, "corpus_name": "the built-in corpus, on which it was trained"}


def _tokens_of(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> tuple[list[str], Tensor]:
    """The pieces of the text and its token ids [N], at most `max_tokens`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid UTF-8 at character {error.start + 1}") from None
    if max_tokens is not None and not 1 <= max_tokens <= MOST_TOKENS:
        raise UserError(f"max_tokens={max_tokens} is not a whole number from 1 to {MOST_TOKENS}")
    limit = max_tokens or MOST_TOKENS
    beginning = text[: CHARACTERS_A_TOKEN * (limit + 1)]
    tokens, ends = _encode_with_ends(tokenizer, beginning)
    if len(tokens) <= limit and len(beginning) < len(text):
        beginning = text
        tokens, ends = _encode_with_ends(tokenizer, text)
    if len(tokens) > limit and max_tokens is None:
        count = f"{len(tokens):,}" if len(beginning) == len(text) else f"more than {MOST_TOKENS:,}"
        raise UserError(
            f"the text has {count} tokens, and a page shows at most {MOST_TOKENS:,}: "
            f"--tokens {MOST_TOKENS} takes the first {MOST_TOKENS:,}"
        )
    if not text.strip() or not tokens:
        raise UserError("the text is empty: there is nothing to explore")
    return pieces_of(beginning, ends[:limit]), torch.tensor(tokens[:limit])


def _encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The token ids as `encode` gives them, and where in the text each token's last character ends."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ends = itertools.accumulate((end for _, end in encoding["offset_mapping"]), max)
    return encoding["input_ids"], list(ends)


def _decode(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What a token looks like; one that is part of a character, as the vocabulary writes it.

    A model may have more tokens than its tokenizer, and even expect one of them: it is shown by its number.
    """
    text, written = str(tokenizer.decode([token_id])), tokenizer.convert_ids_to_tokens(token_id)
    if written is None:
        return f"[{token_id}]"
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return str(written)
    # Some decoders take the space away from what they believe to be the beginning of a text.
    return f" {text}" if str(written).startswith(_SPACE) and not text.startswith(" ") else text


def _read(model: MoxEForCausalLM, sequence: Tensor, pieces: list[str], advance: Callable[[int], None]) -> ReadText:
    """The model reads the start token and the text's N tokens, in chunks of like length with its state carried."""
    losses, next_ids, next_probabilities, routing = [], [], [], []
    state, begin = None, 0
    with record_memory(model) as recording:
        for chunk in torch.tensor_split(sequence, math.ceil(len(sequence) / CHUNK_LENGTH)):
            output = model(
                input_ids=chunk[None].to(model.device), cache_params=state, use_cache=True, output_router_logits=True
            )
            state = output.cache_params
            log_probabilities = torch.log_softmax(output.logits[0].double(), dim=-1)  # [T, V]
            targets = sequence[begin + 1 : begin + 1 + len(chunk)].to(model.device)
            losses.append(-log_probabilities[: len(targets)].gather(1, targets[:, None])[:, 0].cpu())
            top = log_probabilities.topk(min(NEXT_TOKENS, log_probabilities.shape[1]))
            next_ids.append(top.indices.cpu())
            next_probabilities.append(top.values.exp().cpu())
            routing.append(output.routing)
            begin += len(chunk)
            advance(len(chunk))
    layers = [
        combine_routing(parts, lambda tensors: torch.cat([tensor[0] for tensor in tensors]).cpu())
        for parts in zip(*routing, strict=True)
    ]
    return ReadText(
        pieces=pieces,
        token_ids=sequence[1:].numpy(),
        losses=finite_array(torch.cat(losses), "the losses"),
        next_ids=torch.cat(next_ids)[1:].numpy(),
        next_probabilities=torch.cat(next_probabilities)[1:].numpy(),
        routing=[combine_routing([layer], lambda tensors: tensors[0][1:]) for layer in layers],
        memory=memory_of_experts(recording, [layer.expert_indices for layer in layers]),
    )


def _passages(corpus: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The first `CORPUS_TOKENS` tokens of the documents, in pieces of at most `_PASSAGE`."""
    passages, left = [], CORPUS_TOKENS
    for document in corpus:
        tokens = encode(tokenizer, document[: CHARACTERS_A_TOKEN * left])[:left]
        passages += torch.tensor(tokens, dtype=torch.int64).split(_PASSAGE) if tokens else []
        left -= len(tokens)
        if not left:
            break
    return passages


def _spread(passages: list[Tensor]) -> list[Tensor]:
    """About `ROUTED_TOKENS` tokens of passages that lie evenly among all."""
    total = sum(map(len, passages))
    if total <= ROUTED_TOKENS:
        return passages
    count = math.ceil(len(passages) * ROUTED_TOKENS / total)
    return [passages[index] for index in np.linspace(0, len(passages) - 1, count).astype(int)]


def _route(model: MoxEForCausalLM, passages: list[Tensor], advance: Callable[[int], None]) -> list[Ints]:
    """L of [M, K]: where the tokens of all passages went, without the start token before each."""
    batches = []
    for first in range(0, len(passages), _PASSAGES_AT_ONCE):
        batch = passages[first : first + _PASSAGES_AT_ONCE]
        input_ids, attention_mask = pad_right(batch, model.device)
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_router_logits=True,
            logits_to_keep=1,
        )
        kept = attention_mask[:, 1:].bool()
        batches.append([layer.expert_indices[:, 1:][kept].cpu().numpy() for layer in output.routing])
        advance(sum(map(len, batch)) - len(batch))
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]
