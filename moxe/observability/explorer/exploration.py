"""All that the page shows of one model over one text, as numbers.

Legend: N tokens of the text, M tokens of the corpus, V vocabulary, L layers, E experts, K experts a token. Logarithms
are natural.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moxe.models.configuration_moxe import MoxEConfig
from moxe.modules.losses import normalised_entropy
from moxe.modules.router import RouterOutput
from moxe.observability.analysis import (
    MINIMUM_TOKENS,
    finite_array,
    group_log_odds,
    text_blocks,
    token_rarity,
)
from moxe.observability.estimates import ClusterBootstrap, Estimate, Floats, Ints, least_squares_slopes
from moxe.observability.explorer.preferences import Preferences, preferences
from moxe.observability.memory import ExpertMemory
from moxe.observability.routing_watch import CONSTANT_VARIANCE

NEXT_TOKENS = 5
DIFFERENT_TOKENS = 30  # that a text must have before its difficulties say more of the router than of the text
_DECIMALS = 5  # of what is written into the page


@dataclass(frozen=True, eq=False)
class ReadText:
    """What a model made of a text.

    Args:
        pieces: N pieces of the text, one a token; together they are the text, but for what the tokenizer drops at its
            end. A token that only completes a character whose first bytes lie in the token before has an empty piece.
        token_ids: [N].
        losses: [N] -log of the probability that the model gave each token after those before it, nats.
        next_ids, next_probabilities: [N, min(5, V)] the likeliest tokens behind each token, the likeliest first.
        routing: L of [N].
        memory: by layer and expert, the start token before the text counted in; None for experts without memory.
    """

    pieces: list[str]
    token_ids: Ints
    losses: Floats
    next_ids: Ints
    next_probabilities: Floats
    routing: list[RouterOutput]
    memory: list[list[ExpertMemory | None]]


@dataclass(frozen=True, eq=False)
class RoutedCorpus:
    """Text beside the one that is shown, which says how rare a token is and what an expert likes.

    Args:
        name: what the text is, for a reader of the page.
        counts: how often each token id occurs in it.
        token_ids: [M] those of its tokens that the model has read.
        experts: L of [M, K] where they went.
    """

    name: str
    counts: Mapping[int, int]
    token_ids: Ints
    experts: list[Ints]


@dataclass(frozen=True, eq=False)
class LayerExploration:
    """One layer.

    Args:
        difficulty: [N] d (equation 5); None for the standard router.
        entropy: [N] of the unbiased router, normalised (equation 10).
        log_odds: [N] log(P_M / P_S) of the adjusted logits.
        experts: [N, K], the heaviest first.
        weights: [N, K], those of equation 9.
        load: [E] share of the assignments.
        difficulty_variance: of d; None without it.
        is_collapsed: the variance is so small that d is the same for all tokens; None where the text has too few
            different tokens to say so, or there is no d.
        odds_slope: of `log_odds` on d, least squares; its interval is None for a short text. None without d, or where
            it is constant.
        preferences: by expert, in the corpus.
        memory: by expert.
    """

    difficulty: Floats | None
    entropy: Floats
    log_odds: Floats
    experts: Ints
    weights: Floats
    load: Floats
    difficulty_variance: float | None
    is_collapsed: bool | None
    odds_slope: Estimate | None
    preferences: list[Preferences]
    memory: list[ExpertMemory | None]


@dataclass(frozen=True, eq=False)
class Exploration:
    """One model over one text; `vocabulary` names every token id that occurs anywhere in it.

    Args:
        name: of the model, for a reader of the page.
        config: of the model.
        pieces, token_ids, losses, next_ids, next_probabilities: as in `ReadText`.
        rarity: [N] -log of each token's relative frequency in the corpus, nats.
        corpus_name: what the corpus is.
        corpus_tokens: how many tokens say how rare a token is.
        routed_tokens: how many of them, M, say what an expert likes.
        layers: L of them.
    """

    name: str
    config: MoxEConfig
    pieces: list[str]
    token_ids: Ints
    losses: Floats
    next_ids: Ints
    next_probabilities: Floats
    rarity: Floats
    corpus_name: str
    corpus_tokens: int
    routed_tokens: int
    layers: list[LayerExploration]
    vocabulary: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types for the page; arrays of several dimensions are flattened, numbers rounded."""
        return {
            "name": self.name,
            "settings": {name: getattr(self.config, name) for name in self.config.setting_names()},
            "pieces": self.pieces,
            "token_ids": self.token_ids.tolist(),
            "losses": _rounded(self.losses),
            "next_ids": self.next_ids.ravel().tolist(),
            "next_probabilities": _rounded(self.next_probabilities),
            "rarity": _rounded(self.rarity),
            "corpus": {"name": self.corpus_name, "tokens": self.corpus_tokens, "routed_tokens": self.routed_tokens},
            "vocabulary": {str(token_id): text for token_id, text in self.vocabulary.items()},
            "layers": [_layer_to_dict(layer) for layer in self.layers],
        }


def _layer_to_dict(layer: LayerExploration) -> dict[str, Any]:
    return {
        "difficulty": None if layer.difficulty is None else _rounded(layer.difficulty),
        "entropy": _rounded(layer.entropy),
        "log_odds": _rounded(layer.log_odds),
        "experts": layer.experts.ravel().tolist(),
        "weights": _rounded(layer.weights),
        "load": _rounded(layer.load),
        "difficulty_variance": layer.difficulty_variance,
        "is_collapsed": layer.is_collapsed,
        "odds_slope": None if layer.odds_slope is None else dataclasses.asdict(layer.odds_slope),
        "preferences": [dataclasses.asdict(of_expert) for of_expert in layer.preferences],
        "memory": [None if memory is None else dataclasses.asdict(memory) for memory in layer.memory],
    }


def _rounded(values: Floats) -> list[float]:
    return np.round(values, _DECIMALS).ravel().tolist()


def explore_read_text(
    name: str, config: MoxEConfig, text: ReadText, corpus: RoutedCorpus, decode: Callable[[int], str]
) -> Exploration:
    """What the page shows of a model.

    Args:
        name: of the model, for a reader of the page.
        config: of the model.
        text: what it made of the text.
        corpus: text beside it.
        decode: what a token id looks like.

    Raises:
        UserError: for numbers that are not finite.
    """
    blocks = ClusterBootstrap(text_blocks(np.zeros_like(text.token_ids)), seed=0)
    is_telling = len(np.unique(text.token_ids)) >= DIFFERENT_TOKENS
    layers = [
        _explore_layer(
            number,
            routing,
            blocks,
            is_telling,
            preferences(corpus.token_ids, experts, config.num_experts),
            text.memory[number],
        )
        for number, (routing, experts) in enumerate(zip(text.routing, corpus.experts, strict=True))
    ]
    liked = {liking.token_id for layer in layers for one in layer.preferences for liking in one.likings}
    shown = {*np.unique(text.token_ids).tolist(), *np.unique(text.next_ids).tolist(), *liked}
    return Exploration(
        name=name,
        config=config,
        pieces=text.pieces,
        token_ids=text.token_ids,
        losses=text.losses,
        next_ids=text.next_ids,
        next_probabilities=text.next_probabilities,
        rarity=token_rarity(text.token_ids, corpus.counts),
        corpus_name=corpus.name,
        corpus_tokens=sum(corpus.counts.values()),
        routed_tokens=len(corpus.token_ids),
        layers=layers,
        vocabulary={token_id: decode(token_id) for token_id in sorted(shown)},
    )


def _explore_layer(
    number: int,
    routing: RouterOutput,
    blocks: ClusterBootstrap,
    is_telling: bool,
    of_experts: list[Preferences],
    memory: list[ExpertMemory | None],
) -> LayerExploration:
    logits = finite_array(routing.logits, f"the router logits of layer {number}")
    experts, weights = routing.expert_indices.cpu().numpy(), routing.expert_weights.double().cpu().numpy()
    heaviest_first = np.argsort(-weights, axis=1, kind="stable")
    log_odds = group_log_odds(logits)
    difficulty, variance, slope = None, None, None
    if routing.difficulty is not None:
        difficulty = finite_array(routing.difficulty, f"the difficulties of layer {number}")
        variance = float(difficulty.var())
        slope = _odds_slope(blocks, difficulty, log_odds)
    return LayerExploration(
        difficulty=difficulty,
        entropy=normalised_entropy(routing.unbiased_logits.double()).cpu().numpy(),
        log_odds=log_odds,
        experts=np.take_along_axis(experts, heaviest_first, axis=1),
        weights=np.take_along_axis(weights, heaviest_first, axis=1),
        load=np.bincount(experts.ravel(), minlength=logits.shape[1]) / experts.size,
        difficulty_variance=variance,
        is_collapsed=variance < CONSTANT_VARIANCE if variance is not None and is_telling else None,
        odds_slope=slope,
        preferences=of_experts,
        memory=memory,
    )


def _odds_slope(blocks: ClusterBootstrap, difficulty: Floats, log_odds: Floats) -> Estimate | None:
    if np.ptp(difficulty) == 0:
        return None
    (slope,) = least_squares_slopes(blocks, difficulty, log_odds)
    if slope is None or len(difficulty) >= MINIMUM_TOKENS:
        return slope
    return Estimate(slope.value, None, None)


def pieces_of(text: str, ends: Sequence[int]) -> list[str]:
    """The text cut behind each token, so that the pieces together are the text again up to the last token's end.

    Args:
        text: the text.
        ends: where in it the last character of each token ends, never falling.
    """
    return [text[begin:end] for begin, end in pairwise([0, *ends])]
