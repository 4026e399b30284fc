"""Says when a router stops doing its work: an expert that is never chosen, a difficulty that is always the same.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moxe.observability.routing import RoutingStatistics

# The bounds lie well outside what runs that end well show: there an expert may fall under a hundredth of its fair
# share (1 / E of the assignments) for two lines or some 40,000 tokens in the first hundred steps, and the variance of
# the difficulty begins above 0.015 and never falls under 0.005.
DEAD_SHARE = 0.01  # of the fair share
CONSTANT_VARIANCE = 1e-4  # a deviation of a hundredth, where the difficulty lies between 0 and 1
# A state that is said to have begun ends at this many times its bound, so that it is not said over and over.
ENDS_AT = 5
# It begins when it has lasted so long, in lines and in tokens (for each expert), that a short interval shows none.
LINES = 5
TOKENS_AN_EXPERT = 10_000


@dataclass
class _Low:
    """What has stayed under its bound: for how many lines and tokens, after which step, and whether it was said."""

    after_step: int
    lines: int = 0
    tokens: int = 0
    is_said: bool = False


class RoutingWatch:
    """Reads the routing of a run, one logging interval after the other."""

    def __init__(self) -> None:
        self._step = 0
        self._tokens = 0
        self._low: dict[str, _Low] = {}

    def read(self, step: int, tokens: int, layers: Sequence[RoutingStatistics]) -> list[str]:
        """The sentences to print: one for each state that begins or ends with this interval.

        Several processes say the same if the statistics are those of all of them.

        Args:
            step: the interval's last step.
            tokens: read so far, since the beginning of the run.
            layers: the statistics of the interval, one object a layer.
        """
        sentences = []
        for subject, value, bound, long_enough, begins, ends in _subjects(layers):
            low = self._low.get(subject)
            if value < bound:
                low = self._low.setdefault(subject, _Low(after_step=self._step))
                low.lines += 1
                low.tokens += tokens - self._tokens
                if not low.is_said and low.lines >= LINES and low.tokens >= long_enough:
                    low.is_said = True
                    sentences.append(f"{subject} {begins} since step {low.after_step + 1}")
            elif low is not None and (not low.is_said or value >= ENDS_AT * bound):
                del self._low[subject]
                if low.is_said:
                    sentences.append(f"{subject} {ends} at step {step}")
        self._step, self._tokens = step, tokens
        return sentences

    def state_dict(self) -> dict[str, Any]:
        """All that `read` remembers, as JSON keeps it exactly."""
        low = {subject: asdict(state) for subject, state in self._low.items()}
        return {"step": self._step, "tokens": self._tokens, "low": low}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._step, self._tokens = state["step"], state["tokens"]
        self._low = {subject: _Low(**low) for subject, low in state["low"].items()}


def _subjects(layers: Sequence[RoutingStatistics]) -> Iterator[tuple[str, float, float, int, str, str]]:
    """What is watched: its name, value and bound, the tokens that are long enough, and what to say of it."""
    for number, layer in enumerate(layers):
        experts = len(layer.load)
        for expert, load in enumerate(layer.load):
            group = "M" if expert < experts // 2 else "S"
            yield (
                f"layer {number}, expert {expert} (group {group})",
                load * experts,
                DEAD_SHARE,
                TOKENS_AN_EXPERT * experts,
                f"has received less than {DEAD_SHARE:.0%} of its fair share of the tokens",
                "receives tokens again",
            )
        if layer.difficulty_variance is not None:
            yield (
                f"layer {number}, the difficulty",
                layer.difficulty_variance,
                CONSTANT_VARIANCE,
                TOKENS_AN_EXPERT * experts,
                f"has been nearly the same for all tokens (variance below {CONSTANT_VARIANCE:g})",
                "tells tokens apart again",
            )
