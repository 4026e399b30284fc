"""What the routing analysis of a run says about the paper's theory: the only place that knows its keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moxe.experiments.inference import estimate


@dataclass(frozen=True)
class LayerEstimate:
    """A quantity of one layer, over the seeds; the interval is that of the one run where there is one seed."""

    layer: int
    seeds: int
    mean: float
    low: float | None
    high: float | None

    def lies_within(self, least: float, most: float) -> bool:
        """Whether the whole interval does; one run without an interval shows nothing."""
        return self.low is not None and self.high is not None and least <= self.low and self.high <= most

    def lies_outside(self, least: float, most: float) -> bool:
        """Whether the whole interval is below the least or above the most; an infinite end is open."""
        return self.low is not None and self.high is not None and (self.high < least or self.low > most)


# Where an analysis keeps its numbers of a layer: a number, or a mapping with value, low and high.
_ODDS_SLOPE = ("difficulty", "odds_slope")
_RARITY = ("share_with_rarity",)
_RARITY_NAME = "share of mLSTM experts with the rarity"
_QUANTITIES = {
    "slope of log(P_M/P_S) on d": _ODDS_SLOPE,
    "of the raw logits": ("difficulty", "raw_odds_slope"),
    "of the top-k choice": ("difficulty", "assignment_slope"),
    "share of the bias cancelled": ("difficulty", "cancelled_bias"),
    "mean of d": ("difficulty", "mean"),
    "variance of d": ("difficulty", "variance"),
    "d with the loss": ("difficulty", "with_loss"),
    "d with the entropy": ("difficulty", "with_entropy"),
    "d with the rarity": ("difficulty", "with_rarity"),
    "d explained by the token": ("difficulty", "identity_share"),
    "share of group M": ("mlstm_share",),
}


def expected_slope(row: Mapping[str, Any]) -> float | None:
    """2 gamma, by an analysis of the row; None if no run was analysed, or no layer has a difficulty."""
    with_difficulty = [one for one in _analyses(row) if any(layer.get("difficulty") for layer in one["layers"])]
    return next((2 * analysis["gamma"] for analysis in with_difficulty), None)


def odds_slopes(row: Mapping[str, Any]) -> list[LayerEstimate]:
    """By layer the slope of log(P_M / P_S) on difficulty; empty if not analysed."""
    return _by_layer(_analyses(row), _ODDS_SLOPE)


def rarity_correlations(row: Mapping[str, Any]) -> list[LayerEstimate]:
    """By layer the rank correlation of a token's rarity with its share of mLSTM experts.

    Empty if not analysed, or if group M alone does not hold the mLSTM experts.
    """
    return _by_layer([one for one in _analyses(row) if one["expert_kind"] == "xlstm"], _RARITY)


def routing_quantities(row: Mapping[str, Any]) -> dict[str, list[LayerEstimate]]:
    """All that was found of the routers, by its name; empty if no run was analysed."""
    analyses = _analyses(row)
    found = {name: _by_layer(analyses, way) for name, way in _QUANTITIES.items()}
    found[_RARITY_NAME] = rarity_correlations(row)
    return {name: layers for name, layers in found.items() if layers}


def _analyses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run["analysis"] for run in row["runs"] if run["status"] == "done" and run.get("analysis")]


def _by_layer(analyses: Sequence[Mapping[str, Any]], way: Sequence[str]) -> list[LayerEstimate]:
    layers = min((len(analysis.get("layers") or []) for analysis in analyses), default=0)
    found = [_over_seeds(layer, [_reading(one["layers"][layer], way) for one in analyses]) for layer in range(layers)]
    return [one for one in found if one is not None]


_Reading = tuple[float, float | None, float | None]


def _over_seeds(layer: int, readings: Sequence[_Reading | None]) -> LayerEstimate | None:
    known = [reading for reading in readings if reading is not None]
    if not known:
        return None
    if len(known) == 1:
        return LayerEstimate(layer, 1, *known[0])
    over = estimate([value for value, _, _ in known])
    return LayerEstimate(layer, over.n, over.mean, over.low, over.high)


def _reading(layer: Mapping[str, Any], way: Sequence[str]) -> _Reading | None:
    entry: Any = layer
    for key in way:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping):
        entry = {"value": entry}
    value = entry.get("value")
    return None if value is None or not math.isfinite(value) else (value, entry.get("low"), entry.get("high"))
