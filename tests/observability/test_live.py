"""The view of a run fits its terminal and says everything without colour; a plain line holds a line of metrics."""

from __future__ import annotations

import io
import math
import random
import re
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from moxe.observability.follow import RunState
from moxe.observability.live import plain_line, sparkline, view
from moxe.observability.routing_watch import STEPS

LOSSES = ("loss", "lm_loss", "difficulty_loss", "group_loss", "z_loss", "load_balancing_loss")
RECIPE = {"model": {"load_balancing_loss_coef": 0.01}, "training": {"max_steps": 545}}
EXPERTS = ["M0", "M1", "M2", "M3", "S4", "S5", "S6", "S7"]
SIZES = [(80, 24), (200, 50)]


def line(step: int, layers: int = 3, experts: int = 8, dead: dict[int, list[int]] | None = None, **changed: Any) -> Any:
    """A training line; `dead` names experts of a layer that get nothing."""
    statistics = []
    for number in range(layers):
        chance = random.Random(number)
        weights = [chance.uniform(0.5, 2.0) for _ in range(experts)]
        for expert in (dead or {}).get(number, []):
            weights[expert] = 0.0
        load = [weight / sum(weights) for weight in weights]
        statistics.append(
            {
                "load": load,
                "difficulty_mean": 0.5 + number / 100,
                "difficulty_variance": 0.03 + number / 1000,
                "router_entropy": 0.7 + number / 100,
                "mlstm_share": sum(load[: experts // 2]),
            }
        )
    return {
        "step": step,
        "tokens": 1024 * step,
        "learning_rate": 2.9e-3,
        **{term: 5.0 - step / 1000 + place for place, term in enumerate(LOSSES)},
        "gradient_norm": 0.83,
        "skipped_steps": 0,
        "tokens_per_second": 5120.0,
        "layers": statistics,
        **changed,
    }


def state_of(steps: int = 120, **options: Any) -> RunState:
    state = RunState("runs/default", RECIPE)
    for step in range(10, steps + 1, 10):
        state.add(line(step, **options), "here")
    return state


def drawn(state: RunState, width: int = 80, height: int = 24) -> list[str]:
    """The lines of a terminal without colours, every one within it."""
    output = io.StringIO()
    console = Console(file=output, width=width, height=height, color_system=None)
    console.print(view(state, width, height))
    lines = output.getvalue().rstrip("\n").split("\n")
    assert len(lines) <= height
    assert all(len(text) <= width for text in lines)
    return lines


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_default_recipe_is_shown_whole(width: int, height: int):
    state = state_of(120)
    state.add({"step": 100, **{f"validation_{term}": 6.125 for term in LOSSES}, "validation_layers": []}, "here")
    lines = drawn(state, width, height)
    assert lines[0].split("  ") == ["step 120 of 545 (22%)", "about 1 min left", "runs/default"]
    assert lines[1].split("  ") == [
        "5,120 tokens/s",
        "learning rate 2.90e-03",
        "gradient norm 0.83",
        "validated at 100",
    ]
    assert re.split("  +", lines[3].strip()) == ["last", "over 10 lines", "validation", "from step 10"]
    *numbers, curve = re.split("  +", lines[5])
    assert numbers == ["cross-entropy", "5.8800", "-0.1000", "6.1250"]
    assert (curve[0], curve[-1], len(curve)) == ("█", "▁", 12)  # a line each ten steps, falling
    assert [re.split("  +", text)[0] for text in lines[4:10]] == [
        "loss",
        "cross-entropy",
        "difficulty loss",
        "group loss",
        "router z-loss",
        "load balancing",
    ]
    assert lines[12].replace("|", "").split() == ["layer", *EXPERTS, "mean", "variance", "entropy", "M"]
    for number, layer in enumerate(state.layers):
        cells = lines[13 + number].replace("|", "").split()
        assert cells[0] == str(number)
        assert cells[1:9] == [f"{100 * load:.1f}" for load in layer.load]
        expected = [f"{0.5 + number / 100:.2f}", f"{0.03 + number / 1000:.4f}", f"{0.7 + number / 100:.2f}"]
        assert cells[9:] == [*expected, f"{layer.mlstm_share:.0%}"]
    bars = [[match.start() for match in re.finditer(r"\|", text)] for text in lines[12:16]]
    assert all(places == bars[0] and len(places) == 2 for places in bars)
    assert len(lines) == 16


def test_a_curve_is_as_high_as_the_means_of_its_parts():
    values = [0.0, 0.0, 7.0, 7.0, math.nan, 3.5, math.nan, math.nan]
    assert sparkline(values, 4) == "▁█▅ "
    assert sparkline(values, 8) == "▁▁██ ▅  "
    assert sparkline(values, 80) == sparkline(values, 8)
    assert sparkline([2.0, 2.0, math.inf], 3) == "▁▁ "


def test_a_terminal_without_the_letters_of_curves_has_none():
    lines = [text.plain for text in view(state_of(120), 120, 40, has_blocks=False).renderables]
    assert lines[3].split() == ["last", "over", "10", "lines"]
    assert not any("▁" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_dead_experts_are_marked_in_words_and_warned_about(width: int, height: int):
    lines = drawn(state_of(STEPS, dead={1: [6]}), width, height)
    (row,) = [text for text in lines if "dead" in text]
    assert row.replace("|", "").split()[7] == "dead"
    assert row.split()[0] == "1"
    text = " ".join(" ".join(lines).split())
    assert "warnings step 100: layer 1, expert 6 (group S): less than 1% of the assignments since step 1; try" in text
    assert text.endswith("model.load_balancing bias or model.load_balancing_loss_coef above 0.01")
    assert "dead" not in "\n".join(drawn(state_of(STEPS - 10, dead={1: [6]}), width, height))


def test_sixteen_layers_and_experts_are_shown_whole_where_there_is_room():
    lines = drawn(state_of(STEPS, layers=16, experts=16, dead={3: [9]}), 200, 50)
    assert lines[12].replace("|", "").split()[1:17] == [f"{'M' if e < 8 else 'S'}{e}" for e in range(16)]
    assert [text.split()[0] for text in lines[13:29]] == [str(number) for number in range(16)]
    assert lines[16].replace("|", "").split()[10] == "dead"
    assert "warnings" in lines


def test_sixteen_layers_and_experts_are_folded_on_a_small_terminal():
    state = state_of(STEPS, layers=16, experts=16, dead={3: [1, 9, 12], 11: [5]})
    lines = drawn(state, 80, 24)
    start = next(number for number, text in enumerate(lines) if text.startswith("layer"))
    assert lines[start].replace("|", "").split() == [
        "layer",
        *["least", "most"] * 2,
        "mean",
        "variance",
        "entropy",
        "M",
    ]
    rows = {int(text[:5]): text for text in lines[start + 1 :] if re.match(r" +\d+ [MS\d]", text)}
    assert {3, 11} <= rows.keys()
    assert len(rows) >= 4
    load = state.layers[3].load
    most = [max(range(8), key=lambda e: load[e]), max(range(8, 16), key=lambda e: load[e])]
    assert rows[3].replace("|", " ").split()[:9] == [
        *["3", "M1", "dead", f"M{most[0]}", f"{100 * load[most[0]]:.1f}"],
        *["2", "dead", f"S{most[1]}", f"{100 * load[most[1]]:.1f}"],
    ]
    (rest,) = [text for text in lines if text.startswith("and ")]
    others = [(layer.load[e], number, e) for number, layer in enumerate(state.layers) for e in range(16)]
    others = [(share, number, e) for share, number, e in others if number not in rows]
    share, number, expert = min(others)
    name = f"{'M' if expert < 8 else 'S'}{expert}"
    assert rest.startswith(f"and {16 - len(rows)} more: least {100 * share:.1f}% (layer {number}, {name}), most ")
    assert any(text.startswith("warnings") for text in lines)


@pytest.mark.parametrize("width", [1, 20, 40, 79, 81, 133])
@pytest.mark.parametrize("height", [1, 5, 12, 17, 30])
@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (3, 8), (16, 64)])
def test_nothing_breaks_a_terminal_of_any_size(width: int, height: int, layers: int, experts: int):
    state = state_of(STEPS, layers=layers, experts=experts, dead={0: [0, 1]} if experts > 2 else {0: [1]})
    assert state.warnings
    drawn(state, width, height)


def test_more_warnings_than_fit_are_counted_and_the_last_is_shown():
    state = state_of(STEPS, dead={0: [1], 1: [2], 2: [3]})
    assert len(state.warnings) == 3
    lines = drawn(state, 80, 24)
    assert "warnings (the last 2 of 3)" in lines
    assert any(text.startswith("step 100: layer 2, expert 3") for text in lines)
    assert "warnings" in drawn(state, 80, 40)


def test_colours_go_from_idle_to_busy_and_never_hide_a_number():
    load = [0.01, 0.04, 0.125, 0.2, 0.5, 0.125, 0.0, 0.0]
    state = state_of(STEPS, dead={0: [7]})
    state.layers[0].load[:] = load
    styles: dict[str, str] = {}
    for text in view(state, 80, 24).renderables:
        assert isinstance(text, Text)
        for span in text.spans:
            styles.setdefault(text.plain[span.start : span.end].strip(), str(span.style))
    distinct = [styles[cell] for cell in ("1.0", "4.0", "12.5", "20.0", "50.0", "dead")]
    assert len(set(distinct)) == 6
    for style in distinct:  # a foreground and a background each, so it does not matter what the terminal's are
        assert re.fullmatch(r"(bold )?(black|white) on \w+", style)


def test_a_load_takes_four_letters():
    shares = {
        0.0: "0.00",
        0.00156: "0.16",
        0.00994: "0.99",
        0.00996: "1.0",
        0.125: "12.5",
        0.9994: "99.9",
        0.9996: "100",
    }
    state = RunState("run", {})
    for share, expected in shares.items():
        layer = {"difficulty_mean": None, "difficulty_variance": None, "router_entropy": 0.9, "mlstm_share": 0.5}
        state.add(line(10, layers=0) | {"layers": [{"load": [share, 0.5], **layer}]}, "here")
        assert drawn(state)[-1].split()[1] == expected


def test_models_without_difficulty_or_routers_and_numbers_that_are_none_are_shown():
    state = RunState("run", {})
    layers = [{"load": [0.5, 0.5], "difficulty_mean": None, "difficulty_variance": None, "router_entropy": 0.9,
               "mlstm_share": 0.5}]  # fmt: skip
    state.add(line(10, layers=0) | {"layers": layers}, "here")
    assert any(text.replace("|", "").split() == ["0", "50.0", "50.0", "-", "-", "0.90", "50%"] for text in drawn(state))
    assert "difficulty variance" not in plain_line(state.recent[-1], None)

    dense = RunState("run", {})
    dense.add({"step": 10, "loss": 5.0, "lm_loss": 5.0, "layers": []}, "here")
    assert drawn(dense)[-1] == "no routers"
    assert plain_line(dense.recent[-1], None) == "step 10  loss 5.0000  cross-entropy 5.0000"

    nan = {"load": [math.nan] * 2, "difficulty_mean": math.nan, "difficulty_variance": math.nan,
           "router_entropy": math.nan, "mlstm_share": math.nan}  # fmt: skip
    numbers = dict.fromkeys(("loss", "gradient_norm", "tokens_per_second", "learning_rate"), math.nan)
    spoilt = RunState("run", RECIPE)
    spoilt.add(line(10, layers=0) | numbers | {"layers": [nan] * 20}, "here")
    for width, height in SIZES:
        assert any(text.startswith("loss ") and "nan" in text for text in drawn(spoilt, width, height))
    assert "load nan to nan%" in plain_line(spoilt.recent[-1], 545)


def test_before_the_first_line_it_waits():
    assert drawn(RunState("runs/new", RECIPE))[-1] == "waiting for the first line of metrics.jsonl"


def test_a_plain_line_holds_the_losses_the_speed_and_the_extremes_of_the_routing():
    record = line(120, layers=2)
    record["layers"][0] |= {"load": [0.004, 0.4, 0.346, 0.25], "difficulty_variance": 0.0123}
    record["layers"][1] |= {"load": [0.25] * 4, "difficulty_variance": 0.04}
    assert plain_line(record, 545) == (
        "step 120/545  loss 4.8800  cross-entropy 5.8800  difficulty loss 6.8800  group loss 7.8800  "
        "router z-loss 8.8800  load balancing 9.8800  gradient norm 0.83  5,120 tokens/s  load 0.40 to 40.0%  "
        "difficulty variance 0.0123 to 0.0400"
    )
    validation = {"step": 120, "tokens": 1, "validation_loss": 5.0, "validation_lm_loss": 4.5, "validation_tokens": 7}
    assert plain_line(validation, None) == "step 120  validation:  loss 5.0000  cross-entropy 4.5000"
