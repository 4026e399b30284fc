"""UpdateGuard: what is skipped, what stops a run, what is accepted, and that a resumed run decides the same."""

from __future__ import annotations

import json
import math
import random

import pytest

from moxe.errors import UserError
from moxe.training.config import TrainingConfig
from moxe.training.guard import NEEDED, WINDOW, UpdateGuard, Verdict


def make_guard(**settings) -> UpdateGuard:
    return UpdateGuard(TrainingConfig(**{"spike_sigmas": 6.0, **settings}))


def judge(guard: UpdateGuard, lm_loss: float, norm: float = 1.0, z_loss: float = 0.1) -> Verdict:
    return guard.judge({"loss": lm_loss, "lm_loss": lm_loss, "z_loss": z_loss}, norm)


def warm(guard: UpdateGuard, level: float = 5.0, deviation: float = 0.1, steps: int = WINDOW) -> None:
    for step in range(steps):
        assert judge(guard, level + (deviation if step % 2 else -deviation)).action == "update"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["lm_loss", "z_loss", "norm"])
def test_any_number_that_is_not_finite_stops_a_run_and_is_named(number: float, place: str):
    verdict = judge(make_guard(), **{"lm_loss": 5.0, place: number})
    assert (verdict.action, verdict.cause) == ("stop", "nonfinite")
    assert f"{'gradient norm' if place == 'norm' else place} {number}" in verdict.reason


def test_nonfinite_steps_are_skipped_up_to_the_limit_and_an_update_starts_the_count_again():
    guard = make_guard(on_nonfinite="skip", max_skips_in_a_row=2)
    actions = [judge(guard, loss).action for loss in (math.nan, math.nan, 5.0, math.nan, math.nan)]
    assert actions == ["skip", "skip", "update", "skip", "skip"]
    assert guard.skipped_steps == 4
    last = judge(guard, 5.0, norm=math.inf)
    assert last.action == "stop"
    assert "after 2 skipped steps" in last.reason
    assert guard.skipped_steps == 4


def test_a_spike_is_skipped_and_does_not_widen_the_bound_for_the_next():
    guard = make_guard()
    warm(guard)
    assert judge(guard, 5.59) == Verdict("update")
    verdict = judge(guard, 5.75)
    assert (verdict.action, verdict.cause) == ("skip", "spike")
    assert "5.75" in verdict.reason
    before = guard.state_dict()["recent_losses"]
    assert judge(guard, 1000.0).action == "skip"
    assert guard.state_dict()["recent_losses"] == before
    assert guard.skipped_steps == 2


def test_no_spike_below_the_level_nor_without_the_setting_nor_before_enough_losses():
    guard = make_guard()
    warm(guard)
    assert judge(guard, 0.1) == Verdict("update")
    never = make_guard(spike_sigmas=0.0)
    warm(never)
    assert judge(never, 1e6) == Verdict("update")
    early = make_guard()
    warm(early, steps=NEEDED - 1)
    assert judge(early, 1e6).action == "update"
    enough = make_guard()
    warm(enough, steps=NEEDED)
    assert judge(enough, 1e6).action == "skip"


def test_a_loss_that_stands_still_may_wiggle():
    guard = make_guard()
    warm(guard, level=3.0, deviation=0.0)
    assert judge(guard, 3.0 + 5.9 * 0.02).action == "update"
    assert judge(guard, 3.0 + 6.5 * 0.02).action == "skip"


def test_a_loss_that_falls_noisily_is_never_a_spike():
    noise = random.Random(0)
    guard = make_guard()
    for step in range(600):
        verdict = judge(guard, 4.5 + 4 * math.exp(-step / 60) + noise.gauss(0, 0.1))
        assert verdict == Verdict("update"), f"step {step}"


def test_a_lasting_rise_becomes_the_new_level():
    guard = make_guard(max_skips_in_a_row=3)
    warm(guard)
    assert [judge(guard, 8.0).action for _ in range(3)] == ["skip"] * 3
    accepted = judge(guard, 8.0)
    assert (accepted.action, accepted.cause) == ("update", "spike")
    warm(guard, level=8.0)
    assert judge(guard, 8.3) == Verdict("update")
    assert [judge(guard, 20.0).action for _ in range(4)] == ["skip"] * 3 + ["update"]
    assert guard.skipped_steps == 6


def test_only_the_recent_losses_count():
    guard = make_guard()
    warm(guard, level=9.0, deviation=2.0)
    warm(guard, level=5.0, deviation=0.1)
    assert judge(guard, 5.7).action == "skip"


def test_spikes_and_nonfinite_steps_in_turn_come_to_an_end():
    guard = make_guard(on_nonfinite="skip", max_skips_in_a_row=2)
    warm(guard)
    actions = [judge(guard, 50.0 if step % 2 else math.nan).action for step in range(5)]
    assert actions == ["skip"] * 4 + ["stop"]


@pytest.mark.parametrize("stopped_after", [10, NEEDED + 4, 150, 202, 300, 302])
def test_a_resumed_run_decides_the_same(stopped_after: int):
    noise = random.Random(1)
    losses = [4 + 4 * math.exp(-step / 40) + noise.gauss(0, 0.1) for step in range(400)]
    for step in (60, 61, 250, 350):
        losses[step] = 30.0
    for step in range(200, 207):
        losses[step] = math.nan
    losses[300:320] = [7.0] * 20
    whole, first, resumed = (make_guard(on_nonfinite="skip", max_skips_in_a_row=5) for _ in range(3))
    expected = [judge(whole, loss) for loss in losses]
    assert len({(verdict.action, verdict.cause) for verdict in expected}) == 5
    verdicts = [judge(first, loss) for loss in losses[:stopped_after]]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    verdicts += [judge(resumed, loss) for loss in losses[stopped_after:]]
    assert verdicts == expected
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "setting",
    [{"spike_sigmas": -1.0}, {"spike_sigmas": math.inf}, {"spike_sigmas": math.nan}, {"max_skips_in_a_row": 0}],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(setting))):
        TrainingConfig(**setting)
