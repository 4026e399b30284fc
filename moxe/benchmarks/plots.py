"""Pictures of the answers, one a question that has something to draw.

Colours are told apart with any colour vision (Okabe and Ito's palette).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import LogLocator, NullFormatter

from moxe.benchmarks.report import Figure, Report

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959")
_LINES = {"fp32": "-", "bf16": "--"}


def draw_report(report: Report, folder: Path) -> Path | None:
    """Draws the picture of an answer into a folder; None for a question without one, or one that failed."""
    draw = _PICTURES.get(report.question)
    if draw is None or not report.figures:
        return None
    picture = draw(report)
    path = folder / f"{report.question}.png"
    FigureCanvasAgg(picture).print_png(path)
    return path


def _draw_training(report: Report) -> Picture:
    timed = [
        figure for figure in report.figures if figure.quantity == "milliseconds" and figure.about["setting"] != "trial"
    ]
    shapes = list(dict.fromkeys((figure.about["rows"], figure.about["length"]) for figure in timed))
    picture = Picture(figsize=(5 * len(shapes), 4), layout="constrained")
    for axes, shape in zip(picture.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        own = [figure for figure in timed if (figure.about["rows"], figure.about["length"]) == shape]
        sides = list(dict.fromkeys(figure.side for figure in own))
        settings = list(dict.fromkeys(figure.about["setting"] for figure in own))
        for number, setting in enumerate(settings):
            bars = [figure for figure in own if figure.about["setting"] == setting]
            tokens = shape[0] * shape[1]
            places = [sides.index(bar.side) + (number - (len(settings) - 1) / 2) * 0.4 for bar in bars]
            _bars(axes, places, [[1e3 * tokens / t for t in bar.samples] for bar in bars], number, setting)
        axes.set_xticks(range(len(sides)), [side.replace(" as", "\nas") for side in sides], fontsize=8)
        axes.set_title(f"Training step, B {shape[0]}, S {shape[1]}", fontsize=10)
        axes.set_ylabel("tokens/s (bar: median, line: range)")
        axes.legend(frameon=False)
    return picture


def _draw_cells(report: Report) -> Picture:
    timed = [figure for figure in report.figures if figure.quantity == "milliseconds"]
    names = list(dict.fromkeys(_cell_name(figure) for figure in timed))
    picture = Picture(figsize=(2 + 1.6 * len(names), 4), layout="constrained")
    axes = picture.subplots()
    for number, side in enumerate(dict.fromkeys(figure.side for figure in timed)):
        bars = [figure for figure in timed if figure.side == side]
        places = [names.index(_cell_name(bar)) + 0.4 * number for bar in bars]
        _bars(axes, places, [bar.samples for bar in bars], number, side)
    axes.set_yscale("log")
    axes.set_xticks([place + 0.2 for place in range(len(names))], names, fontsize=8)
    axes.set_title("Cells, forward and backward, float32", fontsize=10)
    axes.set_ylabel("ms (bar: median, line: range)")
    axes.legend(frameon=False)
    return picture


def _cell_name(figure: Figure) -> str:
    about = figure.about
    kind = {"slstm": "sLSTM", "mlstm": "mLSTM"}[about["cell"]]
    return f"{kind}\nB {about['rows']}, S {about['length']}\nDh {about['head_size']}"


def _bars(axes: Axes, places: Sequence[float], samples: Sequence[Sequence[float]], number: int, label: str) -> None:
    heights = [sorted(own)[len(own) // 2] for own in samples]
    below = [height - min(own) for height, own in zip(heights, samples, strict=True)]
    above = [max(own) - height for height, own in zip(heights, samples, strict=True)]
    axes.bar(places, heights, 0.38, yerr=[below, above], capsize=2, color=_COLOURS[number], label=label)


def _draw_decoding(report: Report) -> Picture:
    picture = Picture(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = picture.subplots(1, 2)
    for axes, quantity, unit, label in (
        (time_axes, "milliseconds", 1.0, "ms a token"),
        (memory_axes, "carried bytes", 1e-6, "cache or state, MB"),
    ):
        own = [f for f in report.figures if f.quantity == quantity and not f.about["really_read"]]
        sides = list(dict.fromkeys(figure.side for figure in own))
        for side, weights in dict.fromkeys((figure.side, figure.about["weights"]) for figure in own):
            line = [f for f in own if (f.side, f.about["weights"]) == (side, weights)]
            axes.plot(
                [figure.about["context"] for figure in line],
                [unit * figure.median for figure in line],
                _LINES[weights],
                marker="o",
                markersize=3,
                color=_COLOURS[sides.index(side)],
                label=f"{side}, {weights}",
            )
        contexts = sorted({figure.about["context"] for figure in own})
        axes.set_xscale("log")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_xticks([], minor=True)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8, which="both")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
    time_axes.set_title("Decoding, batch 1", fontsize=10)
    memory_axes.set_title("What is carried from token to token", fontsize=10)
    time_axes.legend(frameon=False, fontsize=8)
    return picture


_PICTURES: dict[str, Callable[[Report], Picture]] = {
    "training": _draw_training,
    "cells": _draw_cells,
    "decoding": _draw_decoding,
}
