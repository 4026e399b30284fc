"""RoutingWatch: what lasts is said once when it begins, with what to try, and once when it ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from moxe.models.configuration_moxe import MoxEConfig
from moxe.observability.metrics import RoutingStatistics
from moxe.observability.routing_watch import STEPS, RoutingWatch, dead_bound
from moxe.recipe import load_recipe, setting_types

SETTINGS = MoxEConfig().to_dict()
LONG = STEPS // 10  # lines of 10 steps


def layer(last_load: float = 0.25, variance: float | None = 0.03) -> RoutingStatistics:
    """A layer of 4 experts; the last has this part of the assignments."""
    load = [(1 - last_load) / 3] * 3 + [last_load]
    mean = None if variance is None else 0.5
    return RoutingStatistics(load, mean, variance, router_entropy=0.9, mlstm_share=0.5)


def read_all(intervals: list[RoutingStatistics], steps: int = 10, **settings: Any) -> list[tuple[int, str]]:
    """The sentences of a run whose layer 1 has these statistics, with the interval that said them."""
    watch = RoutingWatch({**SETTINGS, **settings})
    return [
        (number, sentence)
        for number, statistics in enumerate(intervals, start=1)
        for sentence in watch.read(steps * number, [layer(), statistics])
    ]


def test_a_dead_expert_is_said_once_when_it_has_lasted_and_once_when_it_ends():
    said = read_all([layer()] * 3 + [layer(0.0099)] * 20 + [layer()] * 10)
    assert said == [
        (
            3 + LONG,
            "layer 1, expert 3 (group S): less than 1% of the assignments since step 31; try another --name with a "
            "lower training.learning_rate, model.load_balancing bias or model.load_balancing_loss_coef above 0.01",
        ),
        (24, "layer 1, expert 3 (group S) receives tokens again at step 240"),
    ]


def test_a_constant_difficulty_is_said_once_when_it_has_lasted_and_once_when_it_ends():
    said = read_all([layer()] + [layer(variance=5e-5)] * 15 + [layer(variance=0.02)])
    assert said == [
        (
            1 + LONG,
            "layer 1, the difficulty has been nearly the same for all tokens (variance below 0.0001) since step 11; "
            "try another --name with a lower training.learning_rate, model.difficulty_loss_coef above 0.01 or "
            "model.difficulty_target token_loss",
        ),
        (17, "layer 1, the difficulty tells tokens apart again at step 170"),
    ]


@pytest.mark.parametrize("low", [layer(0.0), layer(variance=0.0)])
def test_what_is_short_is_not_said_in_steps_or_in_lines(low: RoutingStatistics):
    assert not read_all(([low] * (LONG - 1) + [layer()]) * 5)
    assert [number for number, _ in read_all([low] * 20, steps=STEPS)] == [2]
    assert [number for number, _ in read_all([low] * STEPS, steps=1)] == [STEPS]


@pytest.mark.parametrize(
    "normal",
    [layer(0.01), layer(math.nan), layer(variance=1e-4), layer(variance=None), layer(variance=math.nan)],
)
def test_what_is_at_its_bound_or_not_known_is_not_said(normal: RoutingStatistics):
    assert not read_all([normal] * 50)


@pytest.mark.parametrize(("experts", "bound"), [(2, 0.01), (10, 0.01), (16, 0.00625), (64, 0.0015625)])
def test_where_an_even_share_is_small_the_bound_is_a_tenth_of_it(experts: int, bound: float):
    assert dead_bound(experts) == pytest.approx(bound, rel=1e-12)
    even = 1 / experts
    for load, is_dead in ((0.99 * bound, True), (1.01 * bound, False)):
        statistics = RoutingStatistics([load, *[even] * (experts - 1)], None, None, 0.9, 0.5)
        watch = RoutingWatch(SETTINGS)
        said = [sentence for step in range(10, 210, 10) for sentence in watch.read(step, [statistics])]
        assert len(said) == is_dead
        assert all(f"less than {100 * bound:.2g}% of the assignments" in sentence for sentence in said)
        assert watch.dead_experts(0, experts) == [0] * is_dead


def test_what_hovers_around_the_bound_is_said_once():
    low = layer(0.005)
    said = read_all([low] * LONG + [layer(0.012), layer(0.008)] * 10 + [layer(0.06)] + [low] * LONG)
    assert [number for number, _ in said] == [LONG, LONG + 21, 2 * LONG + 21]


def test_experts_that_die_together_are_said_together_and_states_are_kept_apart_by_layer():
    watch = RoutingWatch(SETTINGS)
    layers = [RoutingStatistics([0.0, 0.5, 0.5, 0.0, 0.0, 0.0], 0.5, 0.0, 0.9, 0.5), layer(0.0)]
    said = [sentence for number in range(1, 20) for sentence in watch.read(10 * number, layers)]
    assert [sentence.split(":")[0].split(" has")[0] for sentence in said] == [
        "layer 0, expert 0 (group M)",
        "layer 0, experts 3, 4, 5 (now all of group S)",
        "layer 0, the difficulty",
        "layer 1, expert 3 (group S)",
    ]
    assert watch.dead_experts(0, 6) == [0, 3, 4, 5]
    assert watch.dead_experts(1, 4) == [3]


def test_a_group_is_dead_when_its_last_expert_is():
    watch, said = RoutingWatch(SETTINGS), []
    for number in range(1, 31):
        load = [0.4, 0.3, 0.3, 0.0] if number <= 12 else [0.6, 0.4, 0.0, 0.0]
        said += watch.read(10 * number, [RoutingStatistics(load, None, None, 0.9, 0.5)])
    assert [sentence.split(":")[0] for sentence in said] == [
        "layer 0, expert 3 (group S)",
        "layer 0, expert 2 (now all of group S)",
    ]
    assert "group_loss_coef" not in said[0]
    assert "model.group_loss_coef above 0.01" in said[1]


DEAD_S = RoutingStatistics([0.5, 0.5, 0.0, 0.0], 0.5, 0.0, 0.9, 1.0)
DEAD_M = RoutingStatistics([0.0, 0.0, 0.5, 0.5], 0.5, 0.0, 0.9, 0.0)


@pytest.mark.parametrize(
    ("settings", "statistics", "advised"),
    [
        ({}, layer(0.0), ["model.load_balancing bias", "model.load_balancing_loss_coef above 0.01"]),
        ({"load_balancing": "bias"}, layer(0.0), ["model.balancing_bias_rate above 0.001"]),
        ({}, DEAD_S, ["model.group_loss_coef above 0.01", "model.gamma below 0.7"]),
        ({}, DEAD_M, ["model.group_loss_coef above 0.01"]),
        ({"gamma": 0.0}, DEAD_S, ["model.group_loss_coef above 0.01"]),
        ({"router_kind": "standard"}, DEAD_S, ["model.group_loss_coef above 0.01"]),
        ({"difficulty_loss_coef": 1}, layer(variance=0.0), ["model.difficulty_loss_coef above 1", "token_loss"]),
        ({"difficulty_target": "token_loss"}, layer(variance=0.0), ["model.difficulty_loss_coef above 0.01"]),
    ],
)
def test_the_advice_fits_the_run(settings: dict[str, Any], statistics: RoutingStatistics, advised: list[str]):
    advice = read_all([statistics] * LONG, **settings)[0][1].partition("; try another --name with ")[2]
    assert all(option in advice for option in ["a lower training.learning_rate", *advised])
    unfit = {
        "load_balancing bias": settings.get("load_balancing") == "bias",
        "gamma": statistics is not DEAD_S or "gamma" in settings or "router_kind" in settings,
        "group_loss_coef": statistics not in (DEAD_S, DEAD_M),
        "token_loss": settings.get("difficulty_target") == "token_loss",
    }
    assert not [option for option, is_unfit in unfit.items() if is_unfit and option in advice]


def test_every_setting_that_is_advised_exists_and_settings_that_are_not_known_have_no_value():
    advised = set()
    for settings in ({}, {"load_balancing": "bias"}):
        watch = RoutingWatch(settings)
        for number in range(1, LONG + 1):
            for sentence in watch.read(10 * number, [DEAD_S, layer(0.0)]):
                assert not any(word in sentence for word in ("above", "below 0.7", "None"))
                words = sentence.replace(",", " ").replace(";", " ").split()
                advised |= {word for word in words if word.startswith(("model.", "training."))}
    assert len(advised) >= 7
    for dotted in advised:
        section, _, key = dotted.partition(".")
        assert key in setting_types(section), dotted
    load_recipe("default", [("model.load_balancing", "bias"), ("model.difficulty_target", "token_loss")])


@pytest.mark.parametrize("stopped_after", [2, 10, 11, 12, 22, 23])
def test_a_resumed_run_says_the_same(stopped_after: int):
    intervals = [layer()] + [layer(0.0, variance=1e-6)] * 20 + [layer(variance=1e-6)] * 3 + [layer()]
    resumed, said = RoutingWatch(SETTINGS), []
    for number, statistics in enumerate(intervals, start=1):
        said += [(number, sentence) for sentence in resumed.read(10 * number, [layer(), statistics])]
        if number == stopped_after:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = RoutingWatch(SETTINGS)
            resumed.load_state_dict(state)
    assert said == read_all(intervals)
    assert len(said) == 4


def test_the_state_of_a_version_that_counted_tokens_is_read():
    watch = RoutingWatch(SETTINGS)
    low = {"after_step": 10, "lines": 4, "tokens": 40_000, "is_said": False}
    watch.load_state_dict({"step": 50, "tokens": 50_000, "low": {"layer 0, expert 3 (group S)": low}})
    said = [watch.read(step, [layer(0.0)]) for step in (60, 70, 80, 90, 100, 110)]
    assert [len(sentences) for sentences in said] == [0, 0, 0, 0, 0, 1]
    assert "since step 11;" in said[-1][0]
