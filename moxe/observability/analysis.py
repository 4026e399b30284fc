"""Does a trained MoxE do what the theory says? The numbers of one text, layer by layer.

The theory is P_M / P_S = exp(2 gamma d) R with R the odds of the unbiased logits (equations 23 to 43). With balanced
raw logits, log R = 0, the odds of group M follow the difficulty d with slope 2 gamma; in a trained model that is
something to measure, and so is what d itself goes with.

Legend: N tokens, E experts, K experts a token. Logarithms are natural.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from moxe.errors import UserError
from moxe.models.configuration_moxe import MoxEConfig
from moxe.modules.losses import normalised_entropy
from moxe.modules.router import RouterOutput
from moxe.observability.estimates import (
    ClusterBootstrap,
    Estimate,
    Floats,
    Ints,
    Ranks,
    least_squares_slopes,
    logistic_slope,
    omega_squared,
    rank_correlation,
    ratios,
    sums_by_group,
    wider,
)
from moxe.observability.routing_watch import CONSTANT_VARIANCE

BLOCK_LENGTH = 256
"""Tokens of a document that are drawn together: what is said in one place is said with the same words."""
MINIMUM_TOKENS = 2560
"""Ten blocks; of fewer, an interval would say more about the resampling than about the text."""
HISTOGRAM_BINS = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BANDS = 10
SIGNIFICANT_DIGITS = 5  # of what is written down

RareToM = Literal["yes", "reverse", "not seen"]


@dataclass(frozen=True)
class DifficultyAnalysis:
    """The difficulty d of one layer's tokens (equation 5), and what goes with it.

    Args:
        mean, variance: of d.
        quantiles: of d, at `QUANTILES`.
        histogram: tokens in each of `HISTOGRAM_BINS` equal parts of [0, 1].
        log_odds_by_bin: mean log(P_M / P_S) of the tokens of each of them; None where there are none.
        collapsed: the variance is under 1e-4, as in the warnings of a training: a standard deviation of a hundredth,
            where the bias of two tokens differs by a few hundredths of gamma and so changes next to no choice.
        odds_slope: of log(P_M / P_S) on d, least squares, from the adjusted logits (8).
        raw_odds_slope: the same from the unbiased logits. With the `standard` bias the first is 2 gamma more.
        cancelled_bias: share of the bias's mean log-odds that the unbiased logits take back on average:
            -mean(raw log-odds) / mean(adjusted - raw log-odds). 0: none of it; 1: all of it. None without bias.
        assignment_slope: of a logistic regression on d of whether an assignment of the top k went to group M. None if
            all went to one group, or d alone tells the groups apart.
        with_loss, with_entropy, with_rarity: Spearman's rank correlation of d with the loss of the token's next token,
            with the router's normalised entropy (10), and with the rarity of the input token.
        identity_share: omega^2, share of d's variance that the input token's identity explains; None if no token
            repeats.
    """

    mean: float
    variance: float
    quantiles: list[float]
    histogram: list[int]
    log_odds_by_bin: list[float | None]
    collapsed: bool
    odds_slope: Estimate | None
    raw_odds_slope: Estimate | None
    cancelled_bias: Estimate | None
    assignment_slope: Estimate | None
    with_loss: Estimate | None
    with_entropy: Estimate | None
    with_rarity: Estimate | None
    identity_share: float | None


@dataclass(frozen=True)
class RarityBand:
    """Tokens of like rarity: about a tenth of all, since tokens of the same rarity share a band.

    Args:
        tokens: how many.
        rarity: their mean rarity in nats.
        mlstm_share: share of their assignments that went to group M.
    """

    tokens: int
    rarity: float
    mlstm_share: Estimate


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Args:
        load: share of the assignments that each of the E experts received.
        log_odds_mean: mean log(P_M / P_S).
        mlstm_share: share of the assignments that went to group M.
        difficulty: None for the standard router, which has none.
        bands: from the most frequent tokens to the rarest.
        share_with_rarity: Spearman's rank correlation of a token's share of group M with its rarity.
        share_slope: of that share on the rarity, a nat.
        rare_to_m: the paper's claim that rare tokens go to mLSTM experts, in this model: "yes" or "reverse" if the
            interval of `share_with_rarity` lies on one side of 0, else "not seen"; None unless group M alone holds
            mLSTM experts. The interval is about other text for this model, not about other models: which group the
            frequent words went to in its training may be chance.
    """

    load: list[float]
    log_odds_mean: float
    mlstm_share: Estimate
    difficulty: DifficultyAnalysis | None
    bands: list[RarityBand]
    share_with_rarity: Estimate | None
    share_slope: Estimate | None
    rare_to_m: RareToM | None


@dataclass(frozen=True)
class RoutingAnalysis:
    """All layers over one text.

    Args:
        tokens, documents, blocks: how many were analysed; blocks are what the intervals draw.
        context_length: tokens after which the model began anew; None: it read every document as a whole.
        loss: mean loss of the next token, nats.
        rarity_from: whose token frequencies the rarity is of.
        expert_kind, bias_kind, gamma, difficulty_threshold: of the model.
    """

    tokens: int
    documents: int
    blocks: int
    context_length: int | None
    loss: float
    rarity_from: Literal["training corpus", "analysed text"]
    expert_kind: str
    bias_kind: str
    gamma: float
    difficulty_threshold: float
    layers: list[LayerAnalysis]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; numbers are rounded to five significant digits."""
        return _rounded(dataclasses.asdict(self))


def analyse_tokens(
    routing: Sequence[RouterOutput],
    losses: Tensor,
    token_ids: Tensor,
    documents: Tensor,
    *,
    config: MoxEConfig,
    context_length: int | None,
    token_counts: Mapping[int, int] | None,
    seed: int,
) -> RoutingAnalysis:
    """Analyse what the routers decided for N tokens in the order of the text.

    Args:
        routing: one object a layer, with leading dimension [N].
        losses: [N] of the next token, nats.
        token_ids: [N] of the input tokens.
        documents: [N] number of the document of each token; the tokens of a document stand together.
        config: of the model.
        context_length: that the model read the documents with; it is only passed on.
        token_counts: how often each token id occurs in the training corpus; None: in the analysed text. A token that
            is not there counts as if it were there once.
        seed: of the resampling.

    Raises:
        UserError: fewer than `MINIMUM_TOKENS` tokens, or numbers that are not finite.
    """
    if len(token_ids) < MINIMUM_TOKENS:
        raise UserError(f"the text gives {len(token_ids)} tokens to analyse, but at least {MINIMUM_TOKENS} are needed")
    ids = token_ids.cpu().numpy().astype(np.int64)
    text = _Text(
        losses=finite_array(losses, "the losses"),
        token_ids=ids,
        rarity=token_rarity(ids, token_counts),
        blocks=ClusterBootstrap(text_blocks(documents.cpu().numpy()), seed=seed),
        types=ClusterBootstrap(np.unique(ids, return_inverse=True)[1], seed=seed),
    )
    return RoutingAnalysis(
        tokens=len(ids),
        documents=len(np.unique(documents.cpu().numpy())),
        blocks=text.blocks.num_clusters,
        context_length=context_length,
        loss=float(text.losses.mean()),
        rarity_from="analysed text" if token_counts is None else "training corpus",
        expert_kind=config.expert_kind,
        bias_kind=config.bias_kind,
        gamma=config.gamma,
        difficulty_threshold=config.difficulty_threshold,
        layers=[_analyse_layer(text, layer, number, config.expert_kind) for number, layer in enumerate(routing)],
    )


@dataclass(frozen=True, eq=False)
class _Text:
    """What all layers have in common: [N] of each token, and the two ways to resample them.

    `blocks` draws passages of the text; `types` draws token types with all their occurrences. What is said about rarity
    is said about token types, of which the most frequent few make up most of a text: it has to hold for both. Neither
    resamples the training: where the words of a model go may have come out so by chance.
    """

    losses: Floats
    token_ids: Ints
    rarity: Floats
    blocks: ClusterBootstrap
    types: ClusterBootstrap

    def with_rarity(self, values: Floats) -> Estimate | None:
        ranks, rarity = Ranks(values), Ranks(self.rarity)
        return wider(*(rank_correlation(drawn, ranks, rarity) for drawn in (self.blocks, self.types)))

    def slope_on_rarity(self, values: Floats) -> Estimate | None:
        return wider(*(least_squares_slopes(drawn, self.rarity, values)[0] for drawn in (self.blocks, self.types)))


def text_blocks(documents: Ints) -> Ints:
    """[N] number of each token's block: at most `BLOCK_LENGTH` consecutive tokens of a document."""
    begins = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
    place = np.arange(len(documents)) - np.repeat(begins, np.diff(begins, append=len(documents)))
    return np.cumsum(place % BLOCK_LENGTH == 0) - 1


def token_rarity(token_ids: Ints, token_counts: Mapping[int, int] | None) -> Floats:
    """[N] -log of the relative frequency of each token, nats.

    The frequencies are those of `token_counts`, where a token that is not there counts as if it were there once; None:
    those of the tokens themselves.
    """
    distinct, inverse, here = np.unique(token_ids, return_inverse=True, return_counts=True)
    if token_counts is None:
        counts, total = here, len(token_ids)
    else:
        counts = np.array([max(1, token_counts.get(int(token), 0)) for token in distinct])
        total = max(1, sum(token_counts.values()))
    return (math.log(total) - np.log(counts))[inverse]


def finite_array(values: Tensor, what: str) -> Floats:
    array = values.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        raise UserError(f"{what} are not all finite: the model has diverged, so there is nothing to analyse")
    return array


def group_log_odds(logits: Floats) -> Floats:
    """[N] log(P_M / P_S) for logits [N, E]."""
    half = logits.shape[1] // 2
    return np.logaddexp.reduce(logits[:, :half], axis=1) - np.logaddexp.reduce(logits[:, half:], axis=1)


def _analyse_layer(text: _Text, layer: RouterOutput, number: int, expert_kind: str) -> LayerAnalysis:
    logits = finite_array(layer.logits, f"the router logits of layer {number}")
    experts = layer.expert_indices.cpu().numpy()  # [N, K]
    (num_tokens, num_experts), k = logits.shape, experts.shape[1]
    to_m = (experts < num_experts // 2).sum(1).astype(float)  # [N] assignments to group M
    log_odds = group_log_odds(logits)
    share_with_rarity = text.with_rarity(to_m / k)
    (mlstm_share,) = ratios(text.blocks, to_m[:, None], np.full((num_tokens, 1), float(k)))
    assert mlstm_share is not None  # a share of k > 0 assignments a token
    return LayerAnalysis(
        load=(np.bincount(experts.ravel(), minlength=num_experts) / experts.size).tolist(),
        log_odds_mean=float(log_odds.mean()),
        mlstm_share=mlstm_share,
        difficulty=_analyse_difficulty(text, layer, log_odds, to_m, k, number),
        bands=_rarity_bands(text, to_m, k),
        share_with_rarity=share_with_rarity,
        share_slope=text.slope_on_rarity(to_m / k),
        rare_to_m=_rare_to_m(share_with_rarity) if expert_kind == "xlstm" else None,
    )


def _analyse_difficulty(
    text: _Text, layer: RouterOutput, log_odds: Floats, to_m: Floats, k: int, number: int
) -> DifficultyAnalysis | None:
    if layer.difficulty is None:
        return None
    difficulty = finite_array(layer.difficulty, f"the difficulties of layer {number}")
    raw_logits = finite_array(layer.unbiased_logits, f"the unbiased router logits of layer {number}")
    raw_odds = group_log_odds(raw_logits)
    entropy = normalised_entropy(layer.unbiased_logits.double()).cpu().numpy()
    bins = np.minimum((difficulty * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1)
    histogram = np.bincount(bins, minlength=HISTOGRAM_BINS)
    sums_by_bin = sums_by_group(bins, log_odds, HISTOGRAM_BINS)
    odds_slope, raw_odds_slope = least_squares_slopes(text.blocks, difficulty, log_odds, raw_odds)
    # Where gamma is 0 both logits are the same numbers, so the bias is exactly 0 and its share is None.
    (cancelled_bias,) = ratios(text.blocks, -raw_odds[:, None], (log_odds - raw_odds)[:, None])
    ranks = Ranks(difficulty)
    return DifficultyAnalysis(
        mean=float(difficulty.mean()),
        variance=float(difficulty.var()),
        quantiles=np.quantile(difficulty, QUANTILES).tolist(),
        histogram=histogram.tolist(),
        log_odds_by_bin=[
            float(total / count) if count else None for total, count in zip(sums_by_bin, histogram, strict=True)
        ],
        collapsed=bool(difficulty.var() < CONSTANT_VARIANCE),
        odds_slope=odds_slope,
        raw_odds_slope=raw_odds_slope,
        cancelled_bias=cancelled_bias,
        assignment_slope=logistic_slope(text.blocks, difficulty, to_m, k),
        with_loss=rank_correlation(text.blocks, ranks, Ranks(text.losses)),
        with_entropy=rank_correlation(text.blocks, ranks, Ranks(entropy)),
        with_rarity=text.with_rarity(difficulty),
        identity_share=omega_squared(difficulty, text.token_ids),
    )


def _rarity_bands(text: _Text, to_m: Floats, k: int) -> list[RarityBand]:
    members = (Ranks(text.rarity).relative * BANDS).astype(int)[:, None] == np.arange(BANDS)  # [N, BANDS]
    members = members[:, members.any(0)].astype(float)
    shares = ratios(text.blocks, members * to_m[:, None], members * k)
    return [
        RarityBand(tokens=int(member.sum()), rarity=float(member @ text.rarity / member.sum()), mlstm_share=share)
        for member, share in zip(members.T, shares, strict=True)
        if share is not None
    ]


def _rare_to_m(share_with_rarity: Estimate | None) -> RareToM:
    if share_with_rarity is not None and share_with_rarity.is_above_zero:
        return "yes"
    return "reverse" if share_with_rarity is not None and share_with_rarity.is_below_zero else "not seen"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
