"""Sides are timed in turn, warm, and a slow one less often."""

from __future__ import annotations

import pytest

from moxe.benchmarks.timing import FEWEST_REPEATS, Samples, time_in_turn


class Work:
    """Sides that take the seconds they are told, on a clock of their own."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.sides = {name: lambda name=name, s=s: self._spend(name, s) for name, s in seconds.items()}

    def _spend(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def test_sides_take_turns_behind_their_warm_up():
    work = Work(a=1, b=2, c=3)
    samples = time_in_turn(work.sides, repeats=2, warm_up=2, clock=work.clock)
    assert work.calls == [*"aabbcc", *"abc", *"abc"]
    assert {name: own.seconds for name, own in samples.items()} == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}


def test_a_side_that_takes_too_long_is_called_less_often_and_evenly():
    work = Work(fast=1, slow=10)
    samples = time_in_turn(work.sides, repeats=10, seconds_a_side=50, clock=work.clock)
    assert len(samples["fast"].seconds) == 10
    assert len(samples["slow"].seconds) == 5
    rounds = "".join(name[0] for name in work.calls[2:])
    assert rounds == "ffsffsffsffsffs"


@pytest.mark.parametrize(("repeats", "calls"), [(10, FEWEST_REPEATS), (2, 2), (1, 1)])
def test_even_the_slowest_side_is_called_a_few_times(repeats: int, calls: int):
    work = Work(slow=1000)
    samples = time_in_turn(work.sides, repeats=repeats, seconds_a_side=1, clock=work.clock)
    assert len(samples["slow"].seconds) == calls


def test_a_slow_warm_up_alone_does_not_count_where_a_second_one_is_fast():
    work = Work(compiled=1)
    first = iter([100.0])
    plain = work.sides["compiled"]

    def side() -> None:
        work.now += next(first, 0.0)
        plain()

    samples = time_in_turn({"compiled": side}, repeats=8, warm_up=2, seconds_a_side=10, clock=work.clock)
    assert samples["compiled"].seconds == (1,) * 8


def test_samples_give_median_and_range():
    samples = Samples((5.0, 1.0, 2.0))
    assert (samples.median, samples.shortest, samples.longest) == (2.0, 1.0, 5.0)
