"""Says when a router stops doing its work: an expert that is never chosen, a difficulty that is always the same.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moxe.observability.metrics import RoutingStatistics, is_number

# An expert below both is dead; with more than ten experts, where an even share is itself small, the second decides.
DEAD_LOAD = 0.01  # of the assignments
DEAD_SHARE = 0.1  # of the even share 1 / E
CONSTANT_VARIANCE = 1e-4  # a deviation of a hundredth, where the difficulty lies between 0 and 1
# A state begins when it has lasted so long. In the default recipe experts stay below the bound for 30 steps at most (70
# without the group loss) and the variance never falls under 0.005. At twice its learning rate single experts do die.
STEPS = 100
LINES = 2  # so that one long interval is not all the evidence
# A state that is said to have begun ends at this many times its bound, so that it is not said over and over.
ENDS_AT = 2


@dataclass
class _Low:
    """What has stayed under its bound: after which step, for how many lines, and whether it was said."""

    after_step: int
    lines: int = 0
    is_said: bool = False


class RoutingWatch:
    """Reads the routing of a run, one logging interval after the other."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Begin with the first step.

        Args:
            model: the settings of the model by name, on which the advice depends; those that it lacks are not known.
        """
        self._model = model
        self._step = 0
        self._low: dict[str, _Low] = {}

    def read(self, step: int, layers: Sequence[RoutingStatistics]) -> list[str]:
        """The sentences to print for the states that begin or end with this interval.

        Experts of a group that die together are said together. Several processes say the same if the statistics are
        those of all of them.

        Args:
            step: the interval's last step.
            layers: the statistics of the interval, one object a layer.
        """
        sentences = []
        for number, layer in enumerate(layers):
            died: dict[tuple[str, int], list[int]] = {}
            bound = dead_bound(len(layer.load))
            for expert, load in enumerate(layer.load):
                subject = _expert(number, expert, len(layer.load))
                if low := self._began(step, subject, load, bound):
                    died.setdefault((_group(expert, len(layer.load)), low.after_step), []).append(expert)
                if self._ended(subject, load, bound):
                    sentences.append(f"{subject} receives tokens again at step {step}")
            sentences += self._obituaries(number, len(layer.load), died)
            sentences += self._of_difficulty(step, number, layer.difficulty_variance)
        self._step = step
        return sentences

    def dead_experts(self, layer: int, num_experts: int) -> list[int]:
        """The experts of a layer that were said to be dead and have not come back."""
        return [expert for expert in range(num_experts) if self._is_said(_expert(layer, expert, num_experts))]

    def state_dict(self) -> dict[str, Any]:
        """All that `read` remembers, as JSON keeps it exactly."""
        return {"step": self._step, "low": {subject: asdict(state) for subject, state in self._low.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, by this version or one that also counted tokens."""
        self._step = state["step"]
        self._low = {
            subject: _Low(low["after_step"], low["lines"], low["is_said"]) for subject, low in state["low"].items()
        }

    def _began(self, step: int, subject: str, value: float, bound: float) -> _Low | None:
        """Count an interval; the state if it has lasted long enough with this one."""
        if not value < bound:  # also a NaN
            if subject in self._low and not self._low[subject].is_said:
                del self._low[subject]
            return None
        low = self._low.setdefault(subject, _Low(after_step=self._step))
        low.lines += 1
        if low.is_said or low.lines < LINES or step - low.after_step < STEPS:
            return None
        low.is_said = True
        return low

    def _ended(self, subject: str, value: float, bound: float) -> bool:
        if self._is_said(subject) and value >= ENDS_AT * bound:
            del self._low[subject]
            return True
        return False

    def _is_said(self, subject: str) -> bool:
        return subject in self._low and self._low[subject].is_said

    def _obituaries(self, layer: int, num_experts: int, died: Mapping[tuple[str, int], list[int]]) -> Iterator[str]:
        dead = self.dead_experts(layer, num_experts)
        percent = f"{100 * dead_bound(num_experts):.2g}%"
        for (group, after_step), experts in died.items():
            whole_group = num_experts // 2 == sum(_group(expert, num_experts) == group for expert in dead)
            names = f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
            yield (
                f"layer {layer}, {names} ({'now all of ' if whole_group else ''}group {group}): less than {percent} of "
                f"the assignments{' each' if len(experts) > 1 else ''} since step {after_step + 1}; "
                + self._advice_for_experts(group, whole_group=whole_group)
            )

    def _of_difficulty(self, step: int, layer: int, variance: float | None) -> Iterator[str]:
        if variance is None:
            return
        subject = f"layer {layer}, the difficulty"
        if low := self._began(step, subject, variance, CONSTANT_VARIANCE):
            yield (
                f"{subject} has been nearly the same for all tokens (variance below {CONSTANT_VARIANCE:g}) since step "
                f"{low.after_step + 1}; {self._advice_for_difficulty()}"
            )
        if self._ended(subject, variance, CONSTANT_VARIANCE):
            yield f"{subject} tells tokens apart again at step {step}"

    # Advice: what helped first, where it is known; every run may be given another learning rate

    def _advice_for_experts(self, group: str, *, whole_group: bool) -> str:
        options = []
        if whole_group:
            options.append(self._more("group_loss_coef"))
            # The modulation bias lifts group M above group S, never the other way round.
            if group == "S" and self._model.get("router_kind") != "standard" and self._model.get("gamma") != 0:
                options.append(self._other("gamma", "below", "smaller"))
        if self._model.get("load_balancing") == "bias":
            options.append(self._more("balancing_bias_rate"))
        else:
            options += ["model.load_balancing bias", self._more("load_balancing_loss_coef")]
        return _advice(options)

    def _advice_for_difficulty(self) -> str:
        options = [self._more("difficulty_loss_coef")]
        if self._model.get("difficulty_target") != "token_loss":
            options.append("model.difficulty_target token_loss")
        return _advice(options)

    def _more(self, setting: str) -> str:
        return self._other(setting, "above", "larger")

    def _other(self, setting: str, side: str, comparative: str) -> str:
        """A setting and on which side of the run's value the next one may lie."""
        value = self._model.get(setting)
        return f"a {comparative} model.{setting}" if not is_number(value) else f"model.{setting} {side} {value:g}"


def dead_bound(num_experts: int) -> float:
    """The load, as a share of the assignments, below which an expert counts as dead."""
    return min(DEAD_LOAD, DEAD_SHARE / num_experts)


def _group(expert: int, num_experts: int) -> str:
    return "M" if expert < num_experts // 2 else "S"


def _expert(layer: int, expert: int, num_experts: int) -> str:
    return f"layer {layer}, expert {expert} (group {_group(expert, num_experts)})"


def _advice(options: Sequence[str]) -> str:
    return f"try another --name with a lower training.learning_rate, {', '.join(options[:-1])} or {options[-1]}"
