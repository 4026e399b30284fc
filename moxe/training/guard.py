"""Whether the update of an optimiser step is made: not with numbers that are not finite, and not on a spike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moxe.training.config import TrainingConfig

WINDOW = 128  # recent losses that a spike is measured against
NEEDED = 32  # of them before any loss is called a spike
# Without a floor, the deviation of a loss that stands still is that of rounding, and every wiggle a spike. It is in
# nats a token, where a difference means the same at every level of the loss: 0.02 is 2 % of the perplexity.
LEAST_DEVIATION = 0.02


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step.

    Args:
        action: `update` makes it, `skip` leaves weights and optimiser as they are, `stop` ends the run.
        cause: what speaks against the update, also where it is made all the same; None: nothing.
        reason: the cause with its numbers, a clause; "" without a cause.
    """

    action: Literal["update", "skip", "stop"]
    cause: Literal["nonfinite", "spike"] | None = None
    reason: str = ""


class UpdateGuard:
    """Judges the steps of a run, one after the other.

    Skipped steps are counted by their cause and since the last update that was made. More non-finite ones than
    `max_skips_in_a_row` stop the run: they will not end by themselves. After as many spikes the update is made, and
    that loss begins a new window: a lasting change of the data must not freeze the training.

    A spike is measured one-sidedly against mean and standard deviation of the last `WINDOW` losses whose updates were
    made; those of skipped steps would widen the bound for the next. While the loss falls the window's mean lies above
    it and the fall counts as deviation: then the guard sees only the gross spikes, and errs on the side of updating.

    Everything is decided from the arguments of `judge`. Several processes decide alike if these are: losses summed
    over the processes, and the norm of the averaged gradient.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.skips_nonfinite = training.on_nonfinite == "skip"
        self.spike_sigmas = training.spike_sigmas
        self.max_skips_in_a_row = training.max_skips_in_a_row
        self.skipped_steps = 0
        self._nonfinite_in_a_row = 0
        self._spikes_in_a_row = 0
        self._recent = deque[float](maxlen=WINDOW)

    def judge(self, losses: Mapping[str, float], gradient_norm: float) -> Verdict:
        """The verdict on a step whose gradients are there and whose update is not made yet.

        Args:
            losses: the terms of the step's loss by name, `lm_loss` in nats a token among them.
            gradient_norm: before clipping.
        """
        numbers = {**losses, "gradient norm": gradient_norm}
        broken = [f"{name} {number}" for name, number in numbers.items() if not math.isfinite(number)]
        if broken:
            return self._refuse_nonfinite(", ".join(broken))
        spike = self._spike(losses["lm_loss"])
        if spike and self._spikes_in_a_row < self.max_skips_in_a_row:
            self._spikes_in_a_row += 1
            self.skipped_steps += 1
            return Verdict("skip", "spike", spike)
        if spike:
            self._recent.clear()
        self._recent.append(losses["lm_loss"])
        self._nonfinite_in_a_row = self._spikes_in_a_row = 0
        return Verdict("update", "spike" if spike else None, spike)

    def _refuse_nonfinite(self, reason: str) -> Verdict:
        if not self.skips_nonfinite:
            return Verdict("stop", "nonfinite", reason)
        if self._nonfinite_in_a_row == self.max_skips_in_a_row:
            skipped = f"{reason}, after {self._nonfinite_in_a_row} skipped steps like it and no update in between"
            return Verdict("stop", "nonfinite", skipped)
        self._nonfinite_in_a_row += 1
        self.skipped_steps += 1
        return Verdict("skip", "nonfinite", reason)

    def _spike(self, loss: float) -> str:
        """Why the loss is a spike; "" if it is none."""
        count = len(self._recent)
        if not self.spike_sigmas or count < NEEDED:
            return ""
        mean = math.fsum(self._recent) / count
        deviation = math.sqrt(math.fsum((recent - mean) ** 2 for recent in self._recent) / count)
        sigmas = (loss - mean) / max(deviation, LEAST_DEVIATION)
        if sigmas <= self.spike_sigmas:
            return ""
        return f"lm_loss {loss:.4g} lies {sigmas:.1f} standard deviations above the mean {mean:.4g} of recent steps"

    def state_dict(self) -> dict[str, Any]:
        """All that `judge` remembers, in numbers that JSON keeps exactly."""
        return {
            "skipped_steps": self.skipped_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "spikes_in_a_row": self._spikes_in_a_row,
            "recent_losses": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the same steps get the same verdicts."""
        self.skipped_steps = state["skipped_steps"]
        self._nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self._spikes_in_a_row = state["spikes_in_a_row"]
        self._recent = deque(state["recent_losses"], maxlen=WINDOW)
