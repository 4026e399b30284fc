"""An analysis in words: tables with a line by layer, and below each table what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moxe.observability.analysis import (
    QUANTILES,
    DifficultyAnalysis,
    LayerAnalysis,
    RoutingAnalysis,
)
from moxe.observability.estimates import Estimate
from moxe.observability.routing_watch import CONSTANT_VARIANCE

UNKNOWN = "-"
TWO_GAMMA = "2\N{GREEK SMALL LETTER GAMMA}"
NO_DIFFICULTY = "the standard router has no difficulty"
COLLAPSED = f"the difficulty has collapsed: nearly the same for all tokens (variance below {CONSTANT_VARIANCE:g})"


@dataclass(frozen=True)
class Table:
    """A line by layer in the order of the layers, each cell ready to print, and one sentence a layer."""

    title: str
    header: list[str]
    rows: list[list[str]]
    readings: list[str]


def tables(analysis: RoutingAnalysis) -> list[Table]:
    """Odds, difficulty, what it goes with, share of group M by rarity, load."""
    layers = analysis.layers
    slope = f"{TWO_GAMMA} = {2 * analysis.gamma:g}"
    if analysis.bias_kind != "standard":
        slope += f" above d = {analysis.difficulty_threshold:g}, 0 below"
    return [
        _table(
            f"How the odds of group M follow the difficulty d (theory: slope {slope})",
            ["slope of log(P_M / P_S)", "of the raw logits", "of the top-k choice", "bias cancelled"],
            layers,
            lambda layer: _of_difficulty(
                layer,
                lambda d: [
                    _interval(d.odds_slope),
                    _interval(d.raw_odds_slope),
                    _interval(d.assignment_slope),
                    _interval(d.cancelled_bias),
                ],
                4,
            ),
            lambda layer: _read_odds(layer.difficulty, analysis),
        ),
        _table(
            "The difficulty d",
            ["mean", "variance", *(f"{quantile:.0%}" for quantile in QUANTILES), "from token"],
            layers,
            lambda layer: _of_difficulty(
                layer,
                lambda d: [f"{d.mean:.3f}", f"{d.variance:.2g}", *map(_short, d.quantiles), _percent(d.identity_share)],
                3 + len(QUANTILES),
            ),
            lambda layer: _read_difficulty(layer.difficulty),
        ),
        _table(
            "Rank correlation of the difficulty",
            ["with the loss", "with the router's entropy", "with the token's rarity"],
            layers,
            lambda layer: _of_difficulty(
                layer, lambda d: [_interval(d.with_loss), _interval(d.with_entropy), _interval(d.with_rarity)], 3
            ),
            lambda layer: _read_correlations(layer.difficulty),
        ),
        _table(
            f"Share of group M from the most frequent to the rarest tokens (rarity from the {analysis.rarity_from})",
            [*map(str, range(1, 1 + max(len(layer.bands) for layer in layers))), "rank correlation", "slope a nat"],
            layers,
            lambda layer: [
                *(f"{band.mlstm_share.value:.0%}" for band in layer.bands),
                _interval(layer.share_with_rarity),
                _interval(layer.share_slope, 3),
            ],
            lambda layer: _read_rarity(layer, analysis.expert_kind),
        ),
        _table(
            "Load: share of the assignments, group M left of group S",
            [f"{'M' if 2 * expert < len(layers[0].load) else 'S'}{expert}" for expert in range(len(layers[0].load))],
            layers,
            lambda layer: [f"{share:.1%}" for share in layer.load],
            _read_load,
        ),
    ]


def _table(
    title: str,
    header: list[str],
    layers: list[LayerAnalysis],
    cells: Callable[[LayerAnalysis], list[str]],
    read: Callable[[LayerAnalysis], str],
) -> Table:
    return Table(
        title,
        ["", *header],
        [[f"layer {number}", *cells(layer)] for number, layer in enumerate(layers)],
        [f"layer {number}: {read(layer)}" for number, layer in enumerate(layers)],
    )


def _of_difficulty(layer: LayerAnalysis, cells: Callable[[DifficultyAnalysis], list[str]], how_many: int) -> list[str]:
    return [UNKNOWN] * how_many if layer.difficulty is None else cells(layer.difficulty)


def _interval(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return UNKNOWN
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f} [{UNKNOWN}]"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _short(number: float) -> str:
    return f"{number:.2f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _read_odds(difficulty: DifficultyAnalysis | None, analysis: RoutingAnalysis) -> str:
    if difficulty is None:
        return NO_DIFFICULTY
    slope, theory = difficulty.odds_slope, 2 * analysis.gamma
    if difficulty.collapsed or slope is None:
        return f"{COLLAPSED}, so its slopes mean nothing"
    if analysis.bias_kind != "standard":
        return (
            f"odds follow difficulty with slope {_interval(slope)} over all tokens; the bias has a slope only above "
            f"d = {analysis.difficulty_threshold:g}, where it is {TWO_GAMMA} = {theory:g}"
        )
    if slope.covers(theory):
        return f"odds follow difficulty with slope {_interval(slope)}, which agrees with {TWO_GAMMA} = {theory:g}"
    if slope.value > theory:
        return (
            f"odds follow difficulty with slope {_interval(slope)}, not {TWO_GAMMA} = {theory:g}: "
            "the raw logits lean too"
        )
    return (
        f"odds {'follow' if slope.value > 0 else 'fall with'} difficulty with slope {_interval(slope)}, "
        f"not {TWO_GAMMA} = {theory:g}: the raw logits lean against it"
    )


def _read_difficulty(difficulty: DifficultyAnalysis | None) -> str:
    if difficulty is None:
        return NO_DIFFICULTY
    if difficulty.collapsed:
        return COLLAPSED
    low, high = difficulty.quantiles[0], difficulty.quantiles[-1]
    identity = difficulty.identity_share
    of_token = "" if identity is None else f"; {identity:.0%} of its variance is the input token's identity"
    return f"the difficulty tells tokens apart: nine in ten lie from {low:.2f} to {high:.2f}{of_token}"


def _read_correlations(difficulty: DifficultyAnalysis | None) -> str:
    if difficulty is None:
        return NO_DIFFICULTY
    if difficulty.collapsed:
        return COLLAPSED
    with_loss = _direction(difficulty.with_loss, "a higher loss", "a lower loss", "no clearly higher or lower loss")
    with_entropy = _direction(difficulty.with_entropy, "more", "less", "not clearly more or less")
    with_rarity = _direction(difficulty.with_rarity, "rarer", "more frequent", "not clearly rarer or more frequent")
    return (
        f"tokens called difficult have {with_loss} ahead, leave the router {with_entropy} uncertain, "
        f"and are {with_rarity}"
    )


def _direction(estimate: Estimate | None, above: str, below: str, neither: str) -> str:
    if estimate is None or not (estimate.is_above_zero or estimate.is_below_zero):
        return neither
    return above if estimate.is_above_zero else below


def _read_rarity(layer: LayerAnalysis, expert_kind: str) -> str:
    if layer.rare_to_m is None:
        return f"all experts are {expert_kind}, so whether rare tokens go to mLSTM experts cannot be asked"
    ends = (
        f"{layer.bands[0].mlstm_share.value:.0%} of the most frequent and "
        f"{layer.bands[-1].mlstm_share.value:.0%} of the rarest tokens' assignments"
    )
    verdict = {
        "yes": "in this model rare tokens go to mLSTM experts more often",
        "reverse": "in this model rare tokens go to mLSTM experts less often, the reverse of the claim",
        "not seen": "that rare tokens go to mLSTM experts is not seen in this model",
    }[layer.rare_to_m]
    return f"{verdict} (they get {ends})"


def _read_load(layer: LayerAnalysis) -> str:
    fair, experts = 1 / len(layer.load), range(len(layer.load))
    least, most = min(experts, key=layer.load.__getitem__), max(experts, key=layer.load.__getitem__)
    return (
        f"group M gets {layer.mlstm_share.value:.0%} of the assignments; the busiest expert, {most}, "
        f"{layer.load[most] / fair:.1f} times its fair share, the idlest, {least}, {layer.load[least] / fair:.1f} times"
    )
