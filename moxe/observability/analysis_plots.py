"""Pictures of an analysis, drawn from its numbers alone, each as PNG and SVG.

odds: log(P_M / P_S) against the difficulty, with the fitted line and the theory's. difficulty: histogram of the
difficulty. rarity: share of group M in bands of tokens of like rarity.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moxe.observability.analysis import HISTOGRAM_BINS, DifficultyAnalysis, LayerAnalysis, RoutingAnalysis
from moxe.observability.figures import BLUE, FORMATS, GREY, ORANGE, grid, save_all

_EDGES = np.linspace(0, 1, HISTOGRAM_BINS + 1)
_LARGEST_DOT = 120.0  # points squared


def draw_analysis(analysis: RoutingAnalysis, output_dir: str | Path) -> list[Path]:
    """Draw odds, difficulty (unless the router has none) and rarity as .png and .svg in `output_dir`."""
    of_layers = [layer.difficulty for layer in analysis.layers]
    difficulties = [difficulty for difficulty in of_layers if difficulty is not None]
    figures = {"rarity": _draw_rarity(analysis.layers)}
    if len(difficulties) == len(of_layers):
        figures["odds"] = _draw_odds(analysis, difficulties)
        figures["difficulty"] = _draw_difficulty(difficulties)
    return save_all(figures, Path(output_dir), FORMATS)


def _draw_odds(analysis: RoutingAnalysis, difficulties: list[DifficultyAnalysis]) -> Figure:
    """Dots are means of the tokens of a bin, as large as they are many; both lines pass through the mean of all."""
    figure, axes = grid(len(difficulties), columns=min(3, len(difficulties)), xlabel="difficulty d")
    middles = (_EDGES[:-1] + _EDGES[1:]) / 2
    for number, (axis, layer, difficulty) in enumerate(zip(axes, analysis.layers, difficulties, strict=True)):
        tokens = np.array(difficulty.histogram)
        taken = tokens > 0
        odds = np.array([value for value in difficulty.log_odds_by_bin if value is not None])
        sizes = np.maximum(4, _LARGEST_DOT * tokens[taken] / tokens.max())
        axis.scatter(middles[taken], odds, sizes, color=GREY, alpha=0.6, linewidths=0)
        ends = np.array([_EDGES[:-1][taken].min(), _EDGES[1:][taken].max()])
        theory = 2 * analysis.gamma
        slopes = {rf"$2\gamma$ = {theory:.2f}": (theory, ORANGE, "--")}
        if difficulty.odds_slope is not None:
            slope = difficulty.odds_slope.value
            slopes[f"fitted: {slope:.2f}"] = (slope, BLUE, "-")
        for label, (slope, color, style) in slopes.items():
            heights = layer.log_odds_mean + slope * (ends - difficulty.mean)
            axis.plot(ends, heights, color=color, linestyle=style, linewidth=1.8, label=label)
        axis.set_title(f"Layer {number}")
        axis.set_ylabel("log(P_M / P_S)", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
    return figure


def _draw_difficulty(difficulties: list[DifficultyAnalysis]) -> Figure:
    figure, axes = grid(len(difficulties), columns=min(3, len(difficulties)), xlabel="difficulty d")
    for number, (axis, difficulty) in enumerate(zip(axes, difficulties, strict=True)):
        tokens = np.array(difficulty.histogram)
        axis.stairs(tokens / tokens.sum(), _EDGES, color=BLUE, fill=True)
        axis.axvline(difficulty.mean, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set_xlim(0, 1)
        axis.set_title(f"Layer {number}: variance {difficulty.variance:.2g}")
        axis.set_ylabel("share of the tokens", fontsize=8)
    return figure


def _draw_rarity(layers: list[LayerAnalysis]) -> Figure:
    figure, axes = grid(len(layers), columns=min(3, len(layers)), xlabel="rarity of the input token (nats)")
    for number, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        rarity = [band.rarity for band in layer.bands]
        shares = [band.mlstm_share for band in layer.bands]
        for place, share in zip(rarity, shares, strict=True):
            if share.low is not None and share.high is not None:
                axis.plot([place, place], [share.low, share.high], color=BLUE, linewidth=1.5)
        axis.plot(rarity, [share.value for share in shares], color=BLUE, marker="o", markersize=4, linewidth=1)
        axis.axhline(layer.mlstm_share.value, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axis.set_ylim(0, 1)
        axis.set_title(f"Layer {number}")
        axis.set_ylabel("share of group M", fontsize=8)
    return figure
