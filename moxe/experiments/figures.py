"""The paper's figures, and ours, drawn from the results alone.

A curve is the mean over seeds with its 95% band; a dot is a mean with its 95% interval. Colours are told apart with any
colour vision (Okabe and Ito's palette), and markers and line styles say the same again.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from moxe.experiments.claims import unevenness
from moxe.experiments.inference import estimate
from moxe.experiments.measures import diverged
from moxe.experiments.theory import expected_slope, odds_slopes
from moxe.experiments.wall_clock import has_others, members_of

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "osD^vP*X<>"
_GROUP_M, _GROUP_S = _COLOURS[0], _COLOURS[1]
# Text, axes and grid: one colour that nothing else has, so that a picture can follow the page into the dark.
_INK = "#1a1a1b"
_FOLLOWS_THE_PAGE = "<style>:root{color:" + _INK + "}@media (prefers-color-scheme:dark){:root{color:#e6e6e6}}</style>"
# No mathematics in labels: they are the user's. Ids that are the same every time.
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.hashsalt": "moxe",
    "font.size": 9,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
}


@dataclass(frozen=True)
class Drawing:
    """A figure as files, and in words.

    Args:
        name: its file's, without an ending.
        title: what it shows.
        caption: what is seen, with numbers.
        alt: what it looks like, for those who do not see it.
        png, svg: the picture; the SVG's text follows a dark page.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class Undrawn:
    """A figure whose data are missing, and which."""

    name: str
    title: str
    why: str


class _NoData(Exception):
    """What a figure needs is not among the results."""


@dataclass(frozen=True)
class _Picture:
    figure: Figure
    caption: str
    alt: str


def draw_figures(results: dict[str, Any]) -> tuple[list[Drawing], list[Undrawn]]:
    """Draw all that the results hold.

    Args:
        results: with the statistics of `moxe.experiments.statistics.add_statistics`.

    Returns:
        The figures, and those whose data are missing.
    """
    drawn, undrawn = [], []
    with mpl.rc_context(_SETTINGS):
        for name, (title, draw) in _FIGURES.items():
            try:
                picture = draw(results)
            except _NoData as missing:
                undrawn.append(Undrawn(name, title, str(missing)))
                continue
            drawn.append(Drawing(name, title, picture.caption, picture.alt, _png(picture), _svg(picture)))
    return drawn, undrawn


def _png(picture: _Picture) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(picture.figure).print_png(buffer)
    return buffer.getvalue()


def _svg(picture: _Picture) -> str:
    """Without a background, and in the page's own ink."""
    for patch in (picture.figure.patch, *(axes.patch for axes in picture.figure.axes)):
        patch.set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(picture.figure).print_svg(buffer, metadata={"Date": None, "Creator": "moxe"})
    drawing = buffer.getvalue().replace(_INK, "currentColor")
    return re.sub(r"(<svg\b[^>]*>)", lambda opening: opening[0] + _FOLLOWS_THE_PAGE, drawing, count=1)


def _members(results: dict[str, Any], table: str, name: str) -> list[dict[str, Any]]:
    """The rows of a table that was run: MoxE alone is of no other table."""
    rows = members_of(results["rows"], table)
    if not has_others(rows):
        raise _NoData(f"{name} was not run")
    return rows


def _curves(part: str, key: str, label: str, name: str, remark: str = "") -> Callable[[dict[str, Any]], _Picture]:
    """A figure of one quantity over training; the remark ends its caption."""

    def draw(results: dict[str, Any]) -> _Picture:
        styles = _styles(results)
        rows = _members(results, "table1", "Table 1")
        curves = [(row, curve) for row in rows if (curve := _mean_curve(row, part, key)) is not None]
        if not curves:
            raise _NoData(f"no run of Table 1 holds a curve of its {name}")
        figure, axes = _canvas(7.2, 4.2)
        for row, curve in curves:
            style = styles[row["name"]]
            axes.plot(curve.tokens, curve.mean, label=row["label"], markevery=max(1, len(curve.tokens) // 8), **style)
            axes.fill_between(curve.tokens, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set(xlabel="training tokens", ylabel=label)
        axes.xaxis.set_major_formatter(_in_thousands)
        _legend(axes)
        ends = [f"{row['label']} {_short(curve.mean[-1])} (n {curve.seeds})" for row, curve in curves]
        caption = f"{label[0].upper()}{label[1:]}, mean over n seeds with its 95% band. At the end: {', '.join(ends)}."
        alt = f"Line chart over training tokens: {name} of {', '.join(row['label'] for row, _ in curves)}."
        return _Picture(figure, f"{caption} {remark}".rstrip(), alt)

    return draw


@dataclass(frozen=True)
class _Curve:
    tokens: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seeds: int


def _mean_curve(row: dict[str, Any], part: str, key: str) -> _Curve | None:
    """Over the seeds that did not diverge, at the tokens of the first, as far as all of them go."""
    curves = []
    for run in _good_runs(row):
        curve = (run.get("curves") or {}).get(part) or {}
        points = [(t, v) for t, v in zip(curve.get("tokens", []), curve.get(key, []), strict=False) if _finite(v)]
        if points:
            curves.append(np.array(points, dtype=np.float64).T)
    if not curves:
        return None
    begin, end = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
    tokens = curves[0][0]
    tokens = tokens[(begin <= tokens) & (tokens <= end)]
    if not len(tokens):
        return None
    estimates = [estimate(column) for column in zip(*(np.interp(tokens, *curve) for curve in curves), strict=True)]
    mean = np.array([point.mean for point in estimates])
    low = np.array([point.mean if point.low is None else point.low for point in estimates])
    high = np.array([point.mean if point.high is None else point.high for point in estimates])
    return _Curve(tokens, mean, low, high, len(curves))


def _draw_last_words(results: dict[str, Any]) -> _Picture:
    rows = [row for row in _members(results, "table1", "Table 1") if row["summary"]["lambada_perplexity"]["n"]]
    if not rows:
        raise _NoData("no run of Table 1 was measured on LAMBADA")
    styles = _styles(results)
    figure, axes = _canvas(7.2, 1.2 + 0.5 * len(rows))
    for place, row in enumerate(rows):
        summary = row["summary"]["lambada_perplexity"]
        color, marker = styles[row["name"]]["color"], styles[row["name"]]["marker"]
        axes.plot(summary["values"], [place] * summary["n"], "o", color=color, alpha=0.5, markersize=4, linewidth=0)
        _dot(axes, summary, place, color, marker)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_in_thousands)
    axes.xaxis.set_minor_formatter(NullFormatter())
    _named_rows(axes, rows)
    axes.set_xlabel("LAMBADA perplexity of the last word (small dots: seeds)")
    told = [f"{row['label']} {_with_interval(row['summary']['lambada_perplexity'], _short)}" for row in rows]
    return _Picture(
        figure,
        f"Perplexity of LAMBADA's last words, geometric mean over seeds with its 95% interval: {'; '.join(told)}.",
        f"Dot chart on a logarithmic axis: last-word perplexity of {', '.join(row['label'] for row in rows)}.",
    )


def _draw_utilisation(results: dict[str, Any]) -> _Picture:
    rows = [row for row in results["rows"] if row["is_reference"] or row["name"] == "no-group-loss"]
    loads = [(row, load) for row in rows if (load := _first_load(row)) is not None]
    if len(loads) < 2:
        raise _NoData("the load of the experts is needed with and without the group loss")
    layers = min(load.shape[1] for _, (_, load) in loads)
    figure = Figure(figsize=(1.2 + 2.6 * layers, 5.2), layout="constrained", dpi=120)
    panels = figure.subplots(len(loads), layers, squeeze=False, sharex="row", sharey=True)
    for (row, (tokens, load)), of_row in zip(loads, panels, strict=True):
        experts = load.shape[-1]
        colours = [*_shades(_GROUP_M, experts // 2), *_shades(_GROUP_S, experts - experts // 2)]
        for layer, axes in enumerate(of_row):
            shares = load[:, layer] / load[:, layer].sum(axis=-1, keepdims=True)
            axes.stackplot(tokens, shares.T, colors=colours, edgecolor="white", linewidth=0.4)
            axes.plot(tokens, shares[:, : experts // 2].sum(axis=-1), color="black", linewidth=1.6)
            axes.axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
            axes.set(ylim=(0, 1), xlim=(tokens[0], tokens[-1]) if len(tokens) > 1 else None)
            axes.set_title(f"{row['label']}, layer {layer}", fontsize=8)
            axes.xaxis.set_major_formatter(_in_thousands)
            axes.xaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("training tokens", fontsize=9)
    figure.supylabel("share of the assignments", fontsize=9)
    told = [f"{row['label']} {_over_seeds(list(unevenness(row).values()))}" for row, _ in loads]
    return _Picture(
        figure,
        "Share of the assignments each expert receives in the first seed; blue from below the mLSTM experts, orange "
        "the sLSTM experts, black the border between them (dashed: one half). Spread over a layer's experts as part of "
        f"their mean, in the last quarter of training, over the seeds: {'; '.join(told)}.",
        f"Stacked bands of expert shares over training tokens, {layers} layers, with and without the group loss.",
    )


def _first_load(row: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Tokens [lines] and load [lines, layer, E] of the first seed that has them."""
    for run in _good_runs(row):
        curves = run.get("curves") or {}
        load = np.asarray(curves.get("load") or [], dtype=np.float64)
        if load.ndim == 3 and np.isfinite(load).all():
            tokens = np.asarray(curves["training"]["tokens"], dtype=np.float64)
            if len(tokens) == len(load):
                return tokens, load
    return None


def _draw_pareto(results: dict[str, Any]) -> _Picture:
    finished = (results["equal_time"].get("table1") or {"finished": []})["finished"]
    if len(finished) < 2:
        raise _NoData("the training time of two models of Table 1 is needed")
    rows = {row["name"]: row for row in results["rows"]}
    figure, axes = _canvas(7.2, 4.2)
    styles = _styles(results)
    for point in finished:
        row = rows[point["name"]]
        summary = row["summary"]["validation_loss"]
        low = summary["mean"] if summary["low"] is None else summary["low"]
        high = summary["mean"] if summary["high"] is None else summary["high"]
        axes.errorbar(
            point["seconds"],
            point["loss"],
            yerr=[[max(0.0, point["loss"] - low)], [max(0.0, high - point["loss"])]],
            capsize=3,
            label=row["label"],
            **{**styles[point["name"]], "linestyle": "none"},
        )
    front = sorted((point["seconds"], point["loss"]) for point in finished if point["on_front"])
    axes.step(*zip(*front, strict=True), where="post", color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats a token)")
    _legend(axes)
    on_front = [rows[point["name"]]["label"] for point in finished if point["on_front"]]
    told = [f"{rows[p['name']]['label']} {p['loss']:.4f} after {p['seconds']:,.0f} s" for p in finished]
    return _Picture(
        figure,
        f"Final validation loss against the time to get there. On the front: {', '.join(on_front)}. {'; '.join(told)}.",
        f"Scatter chart of loss against seconds for {len(finished)} models; a dashed staircase is the Pareto front.",
    )


def _draw_gamma(results: dict[str, Any]) -> _Picture:
    points = [
        (gamma, row["label"], shift)
        for row in members_of(results["rows"], "gamma")
        if (gamma := _gamma_of(row)) is not None and (shift := _shift(row)) is not None
    ]
    points.sort(key=lambda point: point[0])
    if len(points) < 2:
        raise _NoData("two values of gamma are needed, in runs of the same seed")
    margin = results["margins"]["validation_loss"]
    figure, axes = _canvas(6.4, 3.8)
    axes.axhspan(-margin, margin, color=_COLOURS[5], alpha=0.25, linewidth=0)
    for gamma, _, shift in points:
        _upright_dot(axes, gamma, shift._asdict())
    axes.plot([gamma for gamma, _, _ in points], [shift.mean for _, _, shift in points], color=_COLOURS[0], linewidth=1)
    axes.set(xlabel="gamma", ylabel="validation loss less that of full MoxE\n(nats a token; up: worse)")
    told = [f"{label}, gamma {gamma:g}: {_with_interval(shift._asdict(), _signed)}" for gamma, label, shift in points]
    return _Picture(
        figure,
        "Mean paired difference in validation loss to full MoxE by gamma, with 95% intervals; the band is the margin "
        f"of {margin:g} nats: {'; '.join(told)}.",
        f"Dots with intervals: difference in validation loss to full MoxE at {len(points)} values of gamma.",
    )


class _Shift(NamedTuple):
    mean: float
    low: float | None
    high: float | None


def _shift(row: dict[str, Any]) -> _Shift | None:
    """The row's difference to full MoxE, which has none to itself."""
    if row["is_reference"]:
        return _Shift(0.0, 0.0, 0.0)
    compared = row["against_moxe"].get("validation_loss")
    return _Shift(compared["mean"], compared["low"], compared["high"]) if compared and compared["n"] else None


def _gamma_of(row: dict[str, Any]) -> float | None:
    """From the row's own settings; else, where it keeps the default, from the analysis of its runs."""
    for key, value in row["settings"].items():
        if key.split(".")[-1] == "gamma":
            return float(value)
    slope = expected_slope(row)
    return None if slope is None else slope / 2


def _draw_forest(results: dict[str, Any]) -> _Picture:
    rows = [row for row in members_of(results["rows"], "table2") if not row["is_reference"]]
    rows = [row for row in rows if (row["against_moxe"].get("validation_loss") or {"n": 0})["n"]]
    if not rows:
        raise _NoData("no row of Table 2 shares a finished seed with full MoxE")
    margin = results["margins"]["validation_loss"]
    figure, axes = _canvas(7.2, 1.3 + 0.45 * len(rows))
    axes.axvspan(-margin, margin, color=_COLOURS[5], alpha=0.25, linewidth=0)
    axes.axvline(0, color=_INK, linewidth=1)
    for place, row in enumerate(rows):
        _dot(axes, row["against_moxe"]["validation_loss"], place, _COLOURS[place % 7], _MARKERS[place % 10])
    _named_rows(axes, rows)
    axes.set_xlabel("validation loss less that of full MoxE (nats a token; right: worse)")
    told = [
        f"{row['label']} {_with_interval(comparison, _signed)} ({comparison['verdict']})"
        for row in rows
        for comparison in [row["against_moxe"]["validation_loss"]]
    ]
    return _Picture(
        figure,
        f"Mean paired difference to full MoxE with its 95% interval; the band is the margin of {margin:g} nats: "
        f"{'; '.join(told)}.",
        f"Forest plot of {len(rows)} configurations: difference in validation loss to full MoxE with intervals.",
    )


def _draw_theory(results: dict[str, Any]) -> _Picture:
    reference = next((row for row in results["rows"] if row["is_reference"]), None)
    slopes = odds_slopes(reference) if reference else []
    expected = expected_slope(reference) if reference else None
    if expected is None or not slopes:
        raise _NoData("no run of MoxE was analysed")
    figure, axes = _canvas(6.4, 3.6)
    for slope in slopes:
        _upright_dot(axes, slope.layer, {"mean": slope.mean, "low": slope.low, "high": slope.high})
    axes.axhline(expected, color=_COLOURS[1], linestyle="--", linewidth=1.5, label=f"2 gamma = {expected:g}")
    axes.axhline(0, color=_INK, linewidth=0.6)
    axes.set_xticks([slope.layer for slope in slopes])
    axes.set_xlim(slopes[0].layer - 0.5, slopes[-1].layer + 0.5)
    axes.set(xlabel="layer", ylabel="slope of log(P_M / P_S) on difficulty")
    _legend(axes)
    told = [f"layer {s.layer} {_with_interval({'mean': s.mean, 'low': s.low, 'high': s.high}, _short)}" for s in slopes]
    return _Picture(
        figure,
        f"How the odds of an mLSTM expert rise with difficulty, beside 2 gamma = {expected:g}: {'; '.join(told)}.",
        f"Dots with intervals: fitted slope in {len(slopes)} layers, and a dashed line at 2 gamma.",
    )


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _styles(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By the name of a row of Table 1 its style, the same in every figure."""
    return {
        row["name"]: {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _LINES[index % len(_LINES)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 1.5,
        }
        for index, row in enumerate(members_of(results["rows"], "table1"))
    }


def _dot(axes: Axes, value: dict[str, Any], place: int, color: str, marker: str) -> None:
    """A mean with its interval, lying."""
    if value["low"] is not None and math.isfinite(value["high"]):
        axes.plot([value["low"], value["high"]], [place, place], color=color, linewidth=2)
    axes.plot([value["mean"]], [place], marker, color=color, markersize=7)


def _upright_dot(axes: Axes, place: float, value: dict[str, Any]) -> None:
    if value["low"] is not None:
        axes.plot([place, place], [value["low"], value["high"]], color=_COLOURS[0], linewidth=2)
    axes.plot([place], [value["mean"]], "o", color=_COLOURS[0], markersize=6)


def _named_rows(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8)


def _shades(color: str, count: int) -> list[tuple[float, float, float]]:
    """`count` shades of a colour, from dark to light."""
    red, green, blue = to_rgb(color)
    lightness = [0.7 * index / max(1, count - 1) for index in range(count)]
    return [(red + (1 - red) * add, green + (1 - green) * add, blue + (1 - blue) * add) for add in lightness]


def _good_runs(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in row["runs"] if run["status"] == "done" and not diverged(run)]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _in_thousands(tokens: float, _: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:g}M"
    return f"{tokens / 1e3:g}k" if tokens >= 1e3 else f"{tokens:g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+z.4f}"


def _with_interval(value: dict[str, Any], show: Callable[[float], str]) -> str:
    if value["low"] is None:
        return f"{show(value['mean'])} (one seed)"
    return f"{show(value['mean'])} [{show(value['low'])}, {show(value['high'])}]"


def _over_seeds(values: Sequence[float]) -> str:
    if not values:
        return "unknown"
    found = estimate(values)
    return _with_interval({"mean": found.mean, "low": found.low, "high": found.high}, _short)


_FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], _Picture]]] = {
    "fig3a": (
        "Training cross-entropy (the paper's Figure 3a)",
        _curves("training", "lm_loss", "training cross-entropy (nats a token)", "training cross-entropy"),
    ),
    "fig3b": (
        "Validation loss (Figure 3b)",
        _curves("validation", "lm_loss", "validation loss (nats a token)", "validation loss"),
    ),
    "fig3c": (
        "Router z-loss (Figure 3c)",
        _curves("training", "z_loss", "router z-loss", "router z-loss"),
    ),
    "fig3d": (
        "Load-balancing loss (Figure 3d)",
        _curves(
            "training",
            "load_balancing_loss",
            "load-balancing loss (1: uniform)",
            "load-balancing loss",
            "MoxE's is a mean over layers. Qwen's is that of transformers over all layers pooled, where imbalances of "
            "different layers cancel: its values do not compare with MoxE's.",
        ),
    ),
    "fig4": ("LAMBADA perplexity (Figure 4)", _draw_last_words),
    "fig8": ("Utilisation of the experts with and without the group loss (Figure 8)", _draw_utilisation),
    "forest": ("Table 2 as differences to full MoxE", _draw_forest),
    "pareto": ("Loss against time", _draw_pareto),
    "gamma": ("The strength of the bias", _draw_gamma),
    "theory": ("Do the odds follow 2 gamma?", _draw_theory),
}
