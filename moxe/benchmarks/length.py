"""Does a token cost more in a long sequence?

Legend: B rows, S tokens a row.

Our training step in float32 on as many tokens, once in many short rows and once in one long row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moxe.benchmarks import peers
from moxe.benchmarks.checks import check_model
from moxe.benchmarks.peers import LABELS, OURS
from moxe.benchmarks.report import Report, number, spread
from moxe.benchmarks.timing import time_in_turn
from moxe.benchmarks.training import training_step
from moxe.models.configuration_moxe import MoxEConfig

TITLE = "Length: our training step on as many tokens, float32"
COLUMNS = ["B x S", "microseconds a token (range)", "against the first row", "tokens/s"]


@dataclass(frozen=True)
class Sizes:
    """Shapes B, S of as many tokens each; the first is what the others are compared with."""

    model: dict[str, Any]
    shapes: tuple[tuple[int, int], ...]
    seconds_a_side: float = 60.0


FULL = Sizes({"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4}, ((16, 256), (1, 4096)))
QUICK = Sizes({"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1}, ((8, 16), (1, 128)), 2.0)


def measure(sizes: Sizes, *, repeats: int) -> Report:
    """Times a step on each shape, in turn."""
    report = Report("length", TITLE, COLUMNS, check=check_model())
    config, setting = MoxEConfig(**sizes.model), peers.plain_setting(OURS)
    trainees = {shape: peers.build(OURS, config, shape[1], setting) for shape in sizes.shapes}
    steps = {
        f"{rows} x {length}": training_step(trainee, setting, rows, length, config.vocab_size)
        for (rows, length), trainee in trainees.items()
    }
    samples = time_in_turn(steps, repeats=repeats, seconds_a_side=sizes.seconds_a_side)
    first = next(iter(samples.values())).median / _tokens(sizes.shapes[0])
    for shape, own in zip(sizes.shapes, samples.values(), strict=True):
        tokens = _tokens(shape)
        a_token = [1e6 * seconds / tokens for seconds in own.seconds]
        ratio = own.median / tokens / first
        report.add_row(f"{shape[0]} x {shape[1]}", spread(a_token), f"{ratio:.2f}", number(tokens / own.median))
        report.add_timing(LABELS[OURS], own, rows=shape[0], length=shape[1], cost_against_first=ratio)
    return report


def _tokens(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
