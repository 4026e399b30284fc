"""Pictures of several runs on common axes, drawn from their metrics.jsonl alone.

Every setting has a colour and a marker. Its line is the mean over its runs (its seeds, most of the time) and its band
goes from the least to the greatest of them: that is what was seen, for two runs as for ten, and no claim about others.

losses: every term of the loss, and the gradient norm. speed: tokens a second. routing: difficulty, router entropy and
share of the mLSTM experts by layer. utilisation: how uneven the load of a layer's experts is. What a setting does not
have (a difficulty loss, routers, a fourth layer) is not drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from moxe.errors import UserError
from moxe.observability.figures import COLOURS, FORMATS, GREY, MARKERS, grid, save_all
from moxe.observability.metrics import RunMetrics, read_run
from moxe.observability.plots import LOSS_PANELS, ROUTING_PANELS

# A colour comes again with the eighth setting, in another line.
_LINES = ("-", (0, (6, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_BAND = "Line: mean over the runs of a setting. Band: from the least to the greatest of them."
_VALIDATION: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "white", "markersize": 4.5, "linewidth": 1.1}
_KINDS: dict[str, dict[str, Any]] = {"training": {}, "validation": {"marker": "o", **_VALIDATION}}
_LONGEST_LABEL = 48  # letters
_LETTER = 0.075  # inches

# A quantity of a line of metrics.jsonl; None where the line does not have it.
_Quantity = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone, and how they are drawn.

    Args:
        label: what the legend says.
        runs: at least one.
        color, marker, linestyle: told from those of the other settings, also without colours.
        offset: of its markers along the line, as a part of the distance between two, so that equal lines show both.
    """

    label: str
    runs: list[RunMetrics]
    color: str
    marker: str
    linestyle: Any
    offset: float


@dataclass(frozen=True)
class Curve:
    """A quantity over the n steps that all runs of a setting have, each of shape [n]; NaN where one is not finite."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    least: NDArray[np.float64]
    greatest: NDArray[np.float64]


def draw_comparison(
    settings: Mapping[str, Sequence[str | Path]],
    output_dir: str | Path,
    formats: Sequence[str] = FORMATS,
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Draw runs on common axes.

    Args:
        settings: by label the metrics.jsonl of each run of that setting.
        output_dir: made if it is not there, once everything is drawn.
        formats: endings of the files.
        say: is given a sentence, once all is written, for each setting whose runs do not end at the same step.

    Returns:
        The files written: losses, speed and, if a setting has routers, routing and utilisation.

    Raises:
        UserError: for a metrics.jsonl that cannot be drawn, and runs of one setting without a common step.
    """
    drawn = [_read_setting(place, label, paths) for place, (label, paths) in enumerate(settings.items())]
    figures = {
        "losses": _draw_losses(drawn),
        "speed": _draw_speed(drawn),
        "routing": _draw_by_layer(drawn, ROUTING_PANELS, _of_layer),
        "utilisation": _draw_by_layer(drawn, _LOAD_PANELS, _of_load),
    }
    drawn_figures = {name: figure for name, figure in figures.items() if figure is not None}
    written = save_all(drawn_figures, Path(output_dir), formats)
    for setting in drawn:
        if (sentence := _cut_short(setting, settings[setting.label])) is not None:
            say(sentence)
    return written


def curve(lines_of_runs: Sequence[list[dict[str, Any]]], quantity: _Quantity) -> Curve | None:
    """Mean and range over runs of a quantity, at the steps where all of them have it; None if there is no such step."""
    by_run = [
        {line["step"]: value for line in lines if (value := quantity(line)) is not None} for lines in lines_of_runs
    ]
    steps = sorted(set.intersection(*(set(values) for values in by_run)))
    if not steps:
        return None
    values = np.array([[of_run[step] for step in steps] for of_run in by_run], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return Curve(np.array(steps, dtype=np.float64), values.mean(0), values.min(0), values.max(0))


def _read_setting(place: int, label: str, paths: Sequence[str | Path]) -> Setting:
    runs = [read_run(path) for path in paths]
    if curve([run.training for run in runs], lambda line: line["step"]) is None:
        raise UserError(
            f"the runs of {label!r} have no step in common, so there is no mean over them: give each a label of its "
            f"own: {', '.join(map(str, paths))}"
        )
    return Setting(
        label,
        runs,
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        linestyle=_LINES[place // len(COLOURS) % len(_LINES)],
        offset=place * 0.37 % 1,
    )


def _cut_short(setting: Setting, paths: Sequence[str | Path]) -> str | None:
    """How far a setting is drawn if its runs do not end at the same step, else None."""
    ends = [run.training[-1]["step"] for run in setting.runs]
    if min(ends) == max(ends):
        return None
    common = curve([run.training for run in setting.runs], _value("step"))
    assert common is not None  # or it would not have been read
    last = int(common.steps[-1])
    shortest = [str(path) for path, end in zip(paths, ends, strict=True) if end == min(ends)]
    reason = (
        f"where {', '.join(shortest)} {'ends' if len(shortest) == 1 else 'end'}"
        if last == min(ends)
        else "the last that all of its runs have a line for"
    )
    return f"{setting.label}: drawn to step {last:,}, {reason}; its longest run goes to step {max(ends):,}"


def _draw_losses(settings: Sequence[Setting]) -> Figure:
    quantities = [*LOSS_PANELS, ("Gradient norm before clipping", "gradient_norm")]
    panels = [(title, key) for title, key in quantities if _having(settings, _value(key))]
    figure, axes = grid(len(panels), columns=min(3, len(panels)), xlabel="step")
    validated = False
    for axis, (title, key) in zip(axes, panels, strict=True):
        axis.set_title(title)
        for setting in settings:
            _draw(axis, setting, _training(setting, _value(key)))
            validation = curve([run.validation for run in setting.runs], _value(f"validation_{key}"))
            if validation is not None:
                validated = True
                axis.plot(validation.steps, validation.mean, color=setting.color, marker=setting.marker, **_VALIDATION)
        if key == "gradient_norm" and axis.dataLim.minposy < math.inf:  # a spike of one run would flatten all others
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    _explain(figure, settings, _KINDS if validated else {})
    return figure


def _draw_speed(settings: Sequence[Setting]) -> Figure | None:
    speed = _value("tokens_per_second")
    settings = _having(settings, speed)
    if not settings:
        return None
    figure, (axis,) = grid(1, columns=1, xlabel="step")
    figure.set_size_inches(7.2, 4)
    for setting in settings:
        _draw(axis, setting, _training(setting, speed))
    axis.set_title("Tokens a second")
    axis.set_ylim(bottom=0)
    _explain(figure, settings)
    return figure


def _of_layer(key: str, layer: int) -> _Quantity:
    return lambda line: line["layers"][layer][key] if layer < len(line["layers"]) else None


def _of_load(measure: Callable[[NDArray[np.float64]], float], layer: int) -> _Quantity:
    """A measure of the loads of a layer's experts, as multiples of the fair share 1 / E."""

    def quantity(line: dict[str, Any]) -> float | None:
        if layer >= len(line["layers"]):
            return None
        load = np.array(line["layers"][layer]["load"], dtype=np.float64)
        return float(measure(load * len(load)))

    return quantity


# Title and measure of each panel of utilisation.
_LOAD_PANELS = (
    ("Spread of the load (sd / mean)", np.std),
    ("Busiest expert (1 = fair share)", np.max),
    ("Least loaded expert (1 = fair share)", np.min),
)


def _draw_by_layer(
    settings: Sequence[Setting], panels: Sequence[tuple[str, Any]], quantity: Callable[[Any, int], _Quantity]
) -> Figure | None:
    """A row of panels a layer, a column a quantity; None if no setting has routers."""
    panels = [(title, key) for title, key in panels if _having(settings, quantity(key, 0))]
    if not panels:
        return None
    settings = [setting for setting in settings if any(_having([setting], quantity(key, 0)) for _, key in panels)]
    layers = max(len(run.training[0]["layers"]) for setting in settings for run in setting.runs)
    figure, axes = grid(layers * len(panels), columns=len(panels), xlabel="step")
    for place, axis in enumerate(axes):
        layer, (title, key) = place // len(panels), panels[place % len(panels)]
        axis.set_title(f"Layer {layer}: {title[0].lower()}{title[1:]}")
        for setting in settings:
            _draw(axis, setting, _training(setting, quantity(key, layer)))
        if key == "mlstm_share":
            axis.axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for column in range(len(panels)):  # so that the layers of a quantity can be compared by eye
        of_quantity = axes[column :: len(panels)]
        lows, highs = zip(*(axis.get_ylim() for axis in of_quantity), strict=True)
        for axis in of_quantity:
            axis.set_ylim(min(lows), max(highs))
    _explain(figure, settings)
    return figure


def _value(key: str) -> _Quantity:
    return lambda line: line.get(key)


def _training(setting: Setting, quantity: _Quantity) -> Curve | None:
    return curve([run.training for run in setting.runs], quantity)


def _having(settings: Sequence[Setting], quantity: _Quantity) -> list[Setting]:
    """The settings whose training lines hold the quantity."""
    return [setting for setting in settings if _training(setting, quantity) is not None]


def _draw(axis: Axes, setting: Setting, drawn: Curve | None) -> None:
    if drawn is None:
        return
    between = max(1, len(drawn.steps) // 8)
    axis.plot(
        drawn.steps,
        drawn.mean,
        color=setting.color,
        marker=setting.marker,
        linestyle=setting.linestyle,
        markevery=(int(setting.offset * between), between),
        markersize=4,
        linewidth=1.5,
    )
    if len(setting.runs) > 1:
        axis.fill_between(drawn.steps, drawn.least, drawn.greatest, color=setting.color, alpha=0.2, linewidth=0)


def _explain(figure: Figure, settings: Sequence[Setting], kinds: Mapping[str, dict[str, Any]] | None = None) -> None:
    """A legend of the settings, and of kinds of lines, below all panels; above them what the bands are."""
    handles = [
        Line2D(
            [],
            [],
            label=_legend_label(setting),
            color=setting.color,
            marker=setting.marker,
            linestyle=setting.linestyle,
            markersize=5,
        )
        for setting in settings
    ]
    handles += [Line2D([], [], label=kind, color=GREY, **style) for kind, style in (kinds or {}).items()]
    width, height = figure.get_size_inches()
    widest = max(len(str(handle.get_label())) for handle in handles) + 6  # with the line before it
    columns = max(1, min(len(handles), int(width / (_LETTER * widest))))
    figure.set_size_inches(width, height + 0.2 * math.ceil(len(handles) / columns) + 0.2)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label is the user's, and may hold two dollars
    if any(len(setting.runs) > 1 for setting in settings):
        figure.suptitle(_BAND, fontsize=9)


def _legend_label(setting: Setting) -> str:
    """The label and the number of runs; a letter that the font lacks is escaped, the middle of a long one left out."""
    font = get_font(findfont(FontProperties()))
    label = "".join(
        letter if letter.isprintable() and font.get_char_index(ord(letter)) else ascii(letter)[1:-1]
        for letter in setting.label
    )
    if len(label) > _LONGEST_LABEL:
        label = f"{label[: _LONGEST_LABEL // 2]} … {label[-_LONGEST_LABEL // 2 :]}"
    return f"{label} ({len(setting.runs)} runs)" if len(setting.runs) > 1 else label
