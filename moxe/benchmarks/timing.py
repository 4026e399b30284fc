"""Timing of several sides of one comparison, in turn: A B C A B C, so that what the machine does meanwhile hits all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Samples:
    """Seconds of each repeat of one side, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def shortest(self) -> float:
        return min(self.seconds)

    @property
    def longest(self) -> float:
        return max(self.seconds)


def time_in_turn(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    seconds_a_side: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Times every side, one call of each a round.

    Args:
        sides: what to time, by name.
        repeats: rounds, and timed calls of each side.
        warm_up: calls of each side before the first round, at least 1; they are not counted.
        seconds_a_side: a side that would take longer is called in fewer rounds, spread evenly, but never in fewer than
            `FEWEST_REPEATS` (or `repeats`, if that is less).
        clock: seconds that pass.
    """

    def seconds(side: Callable[[], object]) -> float:
        begin = clock()
        side()
        return clock() - begin

    calls = {}
    for name, side in sides.items():
        warm = [seconds(side) for _ in range(warm_up)][-1]
        affordable = repeats if warm * repeats <= seconds_a_side else int(seconds_a_side / warm)
        calls[name] = max(affordable, min(FEWEST_REPEATS, repeats))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for done in range(repeats):
        for name, side in sides.items():
            if (done + 1) * calls[name] // repeats > done * calls[name] // repeats:
                taken[name].append(seconds(side))
    return {name: Samples(tuple(times)) for name, times in taken.items()}
