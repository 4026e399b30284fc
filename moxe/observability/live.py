"""What a person sees of a run that is going on: a view that fits the terminal, or a plain line for each of its metrics.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.text import Text

from moxe.observability.follow import CHANGE_LINES, RunState, is_validation, loss_terms
from moxe.observability.metrics import RoutingStatistics, layers_of

_NAMES = {"lm_loss": "cross-entropy", "z_loss": "router z-loss", "load_balancing_loss": "load balancing"}

# Widths of columns, each followed by a space, and the bar between the groups.
_LABEL, _CELL, _EXTREME, _BAR = 6, 4, 9, "| "
_HEADINGS = ("     difficulty  router group", "  mean variance entropy     M")
_BLOCKS = "▁▂▃▄▅▆▇█"
_LEAST_CURVE = 10  # letters
# From idle to busy, by the load as a multiple of the even share; readable on dark and light terminals alike.
_COLOURS = (
    (0.25, "black on grey93"),
    (0.6, "black on light_sky_blue1"),
    (1.4, "black on sky_blue2"),
    (2.0, "white on dodger_blue3"),
    (math.inf, "white on navy_blue"),
)
_DEAD = "bold white on dark_red"
# Lines that are kept for warnings where there are any: a blank one, the title, and the last warning.
_WARNING_LINES = 5


def view(state: RunState, width: int, height: int, *, has_blocks: bool = True) -> Group:
    """The run on a terminal of `width` columns and `height` lines; what does not fit is folded, never broken.

    Of layers that do not fit those with the least busy experts are shown; of experts that do not fit in a line, the
    least and the most loaded of each group.

    Args:
        has_blocks: whether the terminal can show the blocks that curves are drawn with; they are left out otherwise.
    """
    lines = [*_head(state), Text()]
    if not state.recent:
        lines[-1:] = [Text("waiting for the first line of metrics.jsonl")]
    else:
        terms = loss_terms(state.recent[-1])
        # The head, blank lines, titles, two layers; the first two terms, the loss and the cross-entropy, in any case.
        shown = terms[: max(2, height - 11 - (_WARNING_LINES if state.warnings else 0))]
        lines += _losses(state, shown, width if has_blocks else 0)
        lines.append(Text())
        room = height - len(lines) - (_WARNING_LINES if state.warnings else 0)
        lines += _layers(state, width, room)
        lines += _warnings(state.warnings, width, height - len(lines))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines[:height])


def plain_line(record: Mapping[str, Any], max_steps: int | None) -> str:
    """A line of metrics.jsonl for a file or a pipe; `max_steps` is None where it is not known."""
    steps = "" if max_steps is None else f"/{max_steps}"
    parts = [f"step {record['step']}{steps}"]
    if is_validation(record):
        terms = [name for name in record if name.startswith("validation_") and name.endswith("loss")]
        losses = [_named(name.removeprefix("validation_"), record[name]) for name in terms]
        return "  ".join([f"{parts[0]}  validation:", *losses])
    parts += [_named(name, record[name]) for name in loss_terms(record)]
    if "gradient_norm" in record:
        parts.append(f"gradient norm {record['gradient_norm']:.2f}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if layers := layers_of(record, parts[0]):
        loads = [load for layer in layers for load in layer.load]
        parts.append(f"load {_percent(_least(loads))} to {_percent(_most(loads))}%")
        variances = [layer.difficulty_variance for layer in layers if layer.difficulty_variance is not None]
        if variances:
            parts.append(f"difficulty variance {_least(variances):.4f} to {_most(variances):.4f}")
    return "  ".join(parts)


def _head(state: RunState) -> list[Text]:
    last = state.recent[-1] if state.recent else {}
    of = "" if state.max_steps is None else f" of {state.max_steps:,} ({state.step / state.max_steps:.0%})"
    first = Text(f"step {state.step:,}{of}  ", style="bold")
    if state.seconds_left:
        first.append(f"about {_duration(state.seconds_left)} left  ", style="not bold")
    first.append(state.name, style="not bold")
    second = []
    if "tokens_per_second" in last:
        second.append(f"{last['tokens_per_second']:,.0f} tokens/s")
    if "learning_rate" in last:
        second.append(f"learning rate {last['learning_rate']:.2e}")
    if "gradient_norm" in last:
        second.append(f"gradient norm {last['gradient_norm']:.2f}")
    if last.get("skipped_steps"):
        second.append(f"{last['skipped_steps']:,} steps skipped")
    if state.validation is not None:
        second.append(f"validated at {state.validation['step']:,}")
    return [first, Text("  ".join(second))]


def _losses(state: RunState, terms: Sequence[str], width: int) -> list[Text]:
    """Each term: its last value, by how much it has changed, in the last validation, and its curve where that fits."""
    last, validation = state.recent[-1], state.validation or {}
    lines = min(CHANGE_LINES, len(state.recent) - 1)
    over = f"over {lines} line{'s' if lines > 1 else ''}" if lines else ""
    heading = f"{'':<17}{'last':>9}{over:>15}{'validation' if validation else '':>13}  "
    room = width - len(heading)
    rows = [Text(heading + (f"from step {state.first_step:,}" if room >= _LEAST_CURVE else ""), style="bold")]
    for term in terms:
        change = state.change(term)
        row = f"{_name(term):<17}{last[term]:>9.4f}{'' if change is None else f'{change:+.4f}':>15}"
        validated = validation.get(f"validation_{term}")
        row += f"{'' if validated is None else f'{validated:.4f}':>13}  "
        rows.append(Text(row + (sparkline(state.curves[term], room) if room >= _LEAST_CURVE else "")))
    return rows


def sparkline(values: Sequence[float], width: int) -> str:
    """A letter for each part of the values, as high as their mean; blank where no value is finite."""
    columns = min(width, len(values))
    bounds = [len(values) * column // columns for column in range(columns + 1)]
    parts = [[value for value in values[begin:end] if math.isfinite(value)] for begin, end in pairwise(bounds)]
    means = [math.fsum(part) / len(part) if part else math.nan for part in parts]
    least = _least(means)
    height = _most(means) - least or 1
    return "".join(
        " " if math.isnan(mean) else _BLOCKS[round((len(_BLOCKS) - 1) * (mean - least) / height)] for mean in means
    )


# The layers


def _layers(state: RunState, width: int, room: int) -> list[Text]:
    layers = state.layers
    if not layers:
        return [Text("no routers")]
    num_experts = len(layers[0].load)
    table = _LABEL + num_experts * (_CELL + 1) + 2 * len(_BAR) + len(_HEADINGS[0])
    is_wide = table <= width
    dead = [state.routing_watch.dead_experts(number, num_experts) for number in range(len(layers))]
    lines = _table_heading(num_experts) if is_wide else _folded_heading()
    shown = _most_telling(layers, dead, max(1, room - len(lines)))
    for number in shown:
        layer = layers[number]
        line = Text(f"{number:>{_LABEL - 1}} ")
        for group in _groups(layer.load):
            for cell in (
                _cells(layer.load, group, dead[number]) if is_wide else _extremes(layer.load, group, dead[number])
            ):
                line.append_text(cell).append(" ")
            line.append(_BAR)
        lines.append(line.append(_statistics(layer)))
    rest = [number for number in range(len(layers)) if number not in shown]
    if rest:
        lines.append(_summary(layers, rest))
    return lines


def _groups(load: Sequence[float]) -> tuple[range, range]:
    half = len(load) // 2
    return range(half), range(half, len(load))


def _expert(expert: int, num_experts: int) -> str:
    return f"{'M' if expert < num_experts // 2 else 'S'}{expert}"


def _table_heading(num_experts: int) -> list[Text]:
    names = [f"{_expert(expert, num_experts):>{_CELL}} " for expert in range(num_experts)]
    half = num_experts // 2
    row = f"{'layer':<{_LABEL}}{''.join(names[:half])}{_BAR}{''.join(names[half:])}{_BAR}"
    return _headings("load in % of the assignments", row)


def _folded_heading() -> list[Text]:
    group = f"{'least':<{_EXTREME}} {'most':<{_EXTREME}} "
    return _headings("load in %, group M and group S", f"{'layer':<{_LABEL}}{group}{_BAR}{group}{_BAR}")


def _headings(title: str, row: str) -> list[Text]:
    above = title[: len(row)].ljust(len(row))
    return [Text(above + _HEADINGS[0], style="bold"), Text(row + _HEADINGS[1], style="bold")]


def _cells(load: Sequence[float], group: Iterable[int], dead: Sequence[int]) -> list[Text]:
    return [_cell(load, expert, dead, "") for expert in group]


def _extremes(load: Sequence[float], group: Sequence[int], dead: Sequence[int]) -> list[Text]:
    """The least loaded expert of a group, or how many are dead, and the most loaded one."""
    least = min(group, key=lambda expert: load[expert])
    most = max(group, key=lambda expert: load[expert])
    dead_here = sum(expert in dead for expert in group)
    first = _cell(load, least, dead, f"{_expert(least, len(load))} ")
    if dead_here > 1:
        first = Text(f"{dead_here} dead", style=_DEAD)
    second = _cell(load, most, dead, f"{_expert(most, len(load))} ")
    for cell in (first, second):
        cell.align("left", _EXTREME)
    return [first, second]


def _cell(load: Sequence[float], expert: int, dead: Sequence[int], label: str) -> Text:
    if expert in dead:
        return Text(f"{label}{'dead':>{_CELL}}", style=_DEAD)
    share = load[expert] * len(load)
    style = next((style for bound, style in _COLOURS if share < bound), "")  # none for a NaN
    return Text(f"{label}{_percent(load[expert]):>{_CELL}}", style=style)


def _statistics(layer: RoutingStatistics) -> str:
    mean = "-" if layer.difficulty_mean is None else f"{layer.difficulty_mean:.2f}"
    variance = "-" if layer.difficulty_variance is None else f"{layer.difficulty_variance:.4f}"
    return f"{mean:>6} {variance:>8} {layer.router_entropy:>7.2f} {layer.mlstm_share:>5.0%}"


def _most_telling(layers: Sequence[RoutingStatistics], dead: Sequence[Sequence[int]], room: int) -> list[int]:
    """The numbers of the layers to show, in their order: all, or those with dead or nearly idle experts first."""
    if len(layers) <= room:
        return list(range(len(layers)))
    by_need = sorted(range(len(layers)), key=lambda number: (-len(dead[number]), _least(layers[number].load)))
    return sorted(by_need[: room - 1])


def _summary(layers: Sequence[RoutingStatistics], rest: Sequence[int]) -> Text:
    experts = [
        (layers[number].load[expert], number, expert) for number in rest for expert in range(len(layers[number].load))
    ]
    (least, *at_least), (most, *at_most) = min(experts), max(experts)

    def place(layer: int, expert: int) -> str:
        return f"layer {layer}, {_expert(expert, len(layers[layer].load))}"

    extremes = f"least {_percent(least)}% ({place(*at_least)}), most {_percent(most)}% ({place(*at_most)})"
    return Text(f"and {len(rest)} more: {extremes}")


# The warnings


def _warnings(warnings: Sequence[str], width: int, room: int) -> list[Text]:
    """The last ones that fit, whole but for the last one of all, which is shown as far as it fits."""
    if not warnings or room < 3:
        return []
    lines: list[str] = []
    count = 0
    for warning in reversed(warnings):
        wrapped = textwrap.wrap(warning, max(width, 20), subsequent_indent="  ", break_on_hyphens=False)
        if lines and len(lines) + len(wrapped) > room - 2:
            break
        lines = wrapped + lines
        count += 1
    of = "" if count == len(warnings) else f" (the last {count} of {len(warnings)})"
    return [Text(), Text(f"warnings{of}", style="bold"), *map(Text, lines[: room - 2])]


# Numbers


def _name(term: str) -> str:
    return _NAMES.get(term, term.replace("_", " "))


def _named(term: str, value: float) -> str:
    return f"{_name(term)} {value:.4f}"


def _percent(share: float) -> str:
    """In four letters."""
    percent = 100 * share
    return f"{percent:.{0 if percent >= 99.95 else 2 if percent < 0.995 else 1}f}"


def _least(values: Sequence[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def _most(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"
