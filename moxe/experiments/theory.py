"""What the routing analysis of a run says about the paper's theory: the only place that knows its keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moxe.experiments.inference import estimate


@dataclass(frozen=True)
class LayerEstimate:
    """A quantity of one layer, over the seeds; the interval is that of the one run where there is one seed."""

    layer: int
    mean: float
    low: float | None
    high: float | None

    def lies_within(self, least: float, most: float) -> bool:
        """Whether the whole interval does; one run without an interval shows nothing."""
        return self.low is not None and self.high is not None and least <= self.low and self.high <= most

    def lies_outside(self, least: float, most: float) -> bool:
        """Whether the whole interval is below the least or above the most."""
        return self.low is not None and self.high is not None and (self.high < least or self.low > most)


def odds_slopes(row: Mapping[str, Any]) -> tuple[float, list[LayerEstimate]] | None:
    """2 gamma, and by layer the slope of log(P_M / P_S) on difficulty; None if no run was analysed."""
    analyses = _analyses(row)
    if not analyses or analyses[0].get("gamma") is None:
        return None
    slopes = _by_layer(analyses, "slope")
    return (2 * analyses[0]["gamma"], slopes) if slopes else None


def rarity_correlations(row: Mapping[str, Any]) -> list[LayerEstimate]:
    """By layer the rank correlation of a token's rarity with the share of mLSTM experts; empty if not analysed."""
    return _by_layer(_analyses(row), "rarity_correlation")


def _analyses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run["analysis"] for run in row["runs"] if run["status"] == "done" and run.get("analysis")]


def _by_layer(analyses: Sequence[Mapping[str, Any]], key: str) -> list[LayerEstimate]:
    layers = min((len(analysis.get("layers") or []) for analysis in analyses), default=0)
    found = [
        _over_seeds(layer, [_reading(analysis["layers"][layer], key) for analysis in analyses])
        for layer in range(layers)
    ]
    return [one for one in found if one is not None]


def _over_seeds(
    layer: int, readings: Iterable[tuple[float, float | None, float | None] | None]
) -> LayerEstimate | None:
    known = [reading for reading in readings if reading is not None]
    if not known:
        return None
    if len(known) == 1:
        return LayerEstimate(layer, *known[0])
    over = estimate([value for value, _, _ in known])
    return LayerEstimate(layer, over.mean, over.low, over.high)


def _reading(layer: Mapping[str, Any], key: str) -> tuple[float, float | None, float | None] | None:
    """Value and interval: a number, or a mapping with value, low and high."""
    entry = layer.get(key)
    if not isinstance(entry, Mapping):
        entry = {"value": entry}
    value = entry.get("value")
    return None if value is None or not math.isfinite(value) else (value, entry.get("low"), entry.get("high"))
