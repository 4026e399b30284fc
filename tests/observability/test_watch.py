"""RoutingWatch: what lasts is said once when it begins and once when it ends; what is short is not said."""

from __future__ import annotations

import json
import math

import pytest

from moxe.observability.routing import RoutingStatistics
from moxe.observability.watch import LINES, TOKENS_AN_EXPERT, RoutingWatch

INTERVAL = TOKENS_AN_EXPERT * 4  # tokens of an interval, long enough by itself for 4 experts


def layer(last_share: float = 1.0, variance: float | None = 0.03) -> RoutingStatistics:
    """A layer of 4 experts; the last has this part of its fair share."""
    load = [(1 - last_share / 4) / 3] * 3 + [last_share / 4]
    mean = None if variance is None else 0.5
    return RoutingStatistics(load, mean, variance, router_entropy=0.9, mlstm_share=0.5)


def read_all(intervals: list[RoutingStatistics], tokens: int = INTERVAL) -> list[tuple[int, str]]:
    """The sentences of a run whose layer 1 has these statistics, with the interval that said them; 10 steps each."""
    watch = RoutingWatch()
    return [
        (number, sentence)
        for number, statistics in enumerate(intervals, start=1)
        for sentence in watch.read(10 * number, number * tokens, [layer(), statistics])
    ]


def test_a_dead_expert_is_said_once_when_it_has_lasted_and_once_when_it_ends():
    said = read_all([layer()] * 3 + [layer(0.005)] * 20 + [layer()] * 10)
    assert said == [
        (
            3 + LINES,
            "layer 1, expert 3 (group S) has received less than 1% of its fair share of the tokens since step 31",
        ),
        (24, "layer 1, expert 3 (group S) receives tokens again at step 240"),
    ]


def test_a_constant_difficulty_is_said_once_when_it_has_lasted_and_once_when_it_ends():
    said = read_all([layer()] + [layer(variance=5e-5)] * 10 + [layer(variance=0.02)])
    assert [number for number, _ in said] == [1 + LINES, 12]
    assert said[0][1].startswith("layer 1, the difficulty has been nearly the same for all tokens")
    assert said[0][1].endswith("since step 11")
    assert said[1][1] == "layer 1, the difficulty tells tokens apart again at step 120"


@pytest.mark.parametrize("low", [layer(0.0), layer(variance=0.0)])
def test_what_is_short_is_not_said_in_lines_or_in_tokens(low: RoutingStatistics):
    assert not read_all(([low] * (LINES - 1) + [layer()]) * 5)
    assert not read_all([low] * 20, tokens=INTERVAL // 20 - 1)
    assert [number for number, _ in read_all([low] * 21, tokens=INTERVAL // 20)] == [20]


@pytest.mark.parametrize("normal", [layer(0.02), layer(variance=0.005), layer(variance=None), layer(variance=math.nan)])
def test_a_low_load_or_variance_as_in_runs_that_end_well_is_not_said(normal: RoutingStatistics):
    assert not read_all([normal] * 50)


def test_what_hovers_around_the_bound_is_said_once():
    said = read_all([layer(0.005)] * LINES + [layer(0.012), layer(0.008)] * 10 + [layer(0.06)] + [layer(0.005)] * LINES)
    assert [number for number, _ in said] == [LINES, LINES + 21, 2 * LINES + 21]


def test_states_are_kept_apart_by_layer_and_expert():
    watch = RoutingWatch()
    both = [RoutingStatistics([0.5, 0.0, 0.5, 0.0], 0.5, 0.0, 0.9, 0.5), layer(0.0)]
    said = [sentence for number in range(1, 8) for sentence in watch.read(number, number * INTERVAL, both)]
    assert [sentence.split(" h")[0] for sentence in said] == [
        "layer 0, expert 1 (group M)",
        "layer 0, expert 3 (group S)",
        "layer 0, the difficulty",
        "layer 1, expert 3 (group S)",
    ]


@pytest.mark.parametrize("stopped_after", [2, 4, 5, 6, 12, 13])
def test_a_resumed_run_says_the_same(stopped_after: int):
    intervals = [layer()] + [layer(0.0, variance=1e-6)] * 11 + [layer(variance=1e-6)] * 3 + [layer()]
    resumed, said = RoutingWatch(), []
    for number, statistics in enumerate(intervals, start=1):
        said += [(number, sentence) for sentence in resumed.read(10 * number, number * INTERVAL, [layer(), statistics])]
        if number == stopped_after:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = RoutingWatch()
            resumed.load_state_dict(state)
    assert said == read_all(intervals)
    assert len(said) == 4
