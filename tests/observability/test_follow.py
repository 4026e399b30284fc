"""Following metrics.jsonl: what is new is read once, whatever happens to the file; and what the lines come to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moxe.errors import UserError
from moxe.observability.follow import CHANGE_LINES, MetricsFollower, RunState
from moxe.observability.metrics import MetricsFile, RoutingStatistics
from moxe.observability.routing_watch import STEPS, RoutingWatch

RECIPE = {"training": {"max_steps": 400, "num_epochs": 1.0}}


def training_line(step: int, dead: bool = False, **changed: Any) -> dict[str, Any]:
    """A line of one layer of four experts, 100 tokens a step."""
    load = [0.4, 0.3, 0.3, 0.0] if dead else [0.25] * 4
    layer = {
        "load": load,
        "difficulty_mean": 0.5,
        "difficulty_variance": 0.03,
        "router_entropy": 0.9,
        "mlstm_share": 0.5,
    }
    return {
        "step": step,
        "epoch": step / 250,
        "tokens": 100 * step,
        "learning_rate": 1e-3,
        "loss": 9.0 - step / 100,
        "lm_loss": 8.0 - step / 100,
        "gradient_norm": 1.5,
        "gradient_norms": {"head": 1.5},
        "skipped_steps": 0,
        "tokens_per_second": 1000.0,
        "layers": [layer],
        **changed,
    }


def validation_line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 0.1, "tokens": 1, "validation_loss": 7.5, "validation_lm_loss": 7.0,
            "validation_tokens": 9, "validation_layers": []}  # fmt: skip


def follower_of(path: Path) -> MetricsFollower:
    return MetricsFollower(path, lambda: RunState("run", RECIPE))


def steps(new: list[tuple[dict[str, Any], list[str]]]) -> list[int]:
    return [record["step"] for record, _ in new]


def test_a_file_is_read_from_its_beginning_and_then_what_is_appended(tmp_path: Path):
    follower = follower_of(tmp_path / "metrics.jsonl")
    assert follower.read() == []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert follower.read() == []
    metrics.write(training_line(10))
    metrics.write(training_line(20))
    assert steps(follower.read()) == [10, 20]
    assert follower.read() == []
    metrics.write(validation_line(20))
    metrics.write(training_line(30, loss=math.nan))
    assert steps(follower.read()) == [20, 30]
    state = follower.state
    assert (state.step, state.validation) == (30, validation_line(20))
    assert math.isnan(state.recent[-1]["loss"])


def test_only_what_was_appended_is_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics, follower = MetricsFile(path), follower_of(path)
    metrics.write(training_line(10))
    follower.read()
    with path.open("r+b") as file:
        file.write(b"x" * path.stat().st_size)  # in its place: who reads it again finds no JSON
    metrics.write(training_line(20))
    assert steps(follower.read()) == [20]


def test_a_line_that_is_still_being_written_waits(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(training_line(10)).encode() + b"\n"
    follower = follower_of(path)
    for length in (1, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert follower.read() == []
    with path.open("ab") as file:
        file.write(whole[-1:])
    assert steps(follower.read()) == [10]


def test_a_run_that_goes_on_from_a_checkpoint_is_noticed_and_nothing_is_returned_twice(tmp_path: Path):
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy.jsonl"
    lines = [training_line(step, dead=True) for step in range(10, 210, 10)]
    metrics, follower = MetricsFile(path), follower_of(path)
    for line in lines[:5]:
        metrics.write(line)
    metrics.copy_to(copy)
    for line in lines[5:15]:
        metrics.write(line)
    first = follower.read()
    assert steps(first) == list(range(10, 160, 10))
    assert [record["step"] for record, warnings in first if warnings] == [STEPS]

    metrics = MetricsFile(path, resumed_from=copy)
    assert follower.read() == []
    assert (follower.state.step, follower.state.warnings) == (50, [])
    for line in lines[5:]:
        metrics.write({**line, "tokens_per_second": 900.0})
    second = follower.read()
    assert steps(second) == list(range(60, 210, 10))
    assert not any(warnings for _, warnings in second)  # said before
    assert [warning[:9] for warning in follower.state.warnings] == [f"step {STEPS}:"]


def test_a_replaced_file_that_is_longer_already_is_noticed_too(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    follower, metrics = follower_of(path), MetricsFile(path)
    metrics.write(training_line(10))
    follower.read()
    metrics = MetricsFile(path)
    for step in (5, 10, 15):
        metrics.write(training_line(step, loss=1.0))
    assert steps(follower.read()) == [5, 10, 15]
    assert len(follower.state.recent) == 3


def test_a_file_that_is_cut_short_in_its_place_is_read_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    follower, metrics = follower_of(path), MetricsFile(path)
    for step in (10, 20, 30):
        metrics.write(training_line(step))
    follower.read()
    path.write_text(json.dumps(training_line(10)) + "\n")
    assert follower.read() == []
    assert follower.state.step == 10


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "line 2 of .* is no JSON object"),
        (b"[1]", "line 2 of .* is no JSON object"),
        (b"\xff", "line 2 of .* is no valid UTF-8"),
        (b"{}", "line 2 of .* has no step, so no training wrote it"),
        (b'{"step": 0}', "line 2 of .* holds step=0, which is no whole number from 1 on, so no training"),
        (b'{"step": true}', "line 2 of .* holds step=True, which is no whole number from 1 on"),
        (b'{"step": 1, "epoch": NaN}', "line 2 of .* holds epoch=nan, so no training wrote it"),
        (b'{"step": 1, "epoch": -0.5}', "line 2 of .* holds epoch=-0.5, so no training wrote it"),
        (b'{"step": 1, "epoch": Infinity}', "line 2 of .* holds epoch=inf, so no training wrote it"),
        (b'{"step": 1, "epoch": 1' + 400 * b"0" + b"}", "line 2 of .* holds epoch=a number of 1329 bits, which is no"),
        (b'{"step": 1, "loss": true}', "line 2 of .* holds loss=True, which is no number"),
        (rb'{"step": 1, "x\u001b[31m_loss": 1}', r"line 2 of .* a name that cannot be printed, 'x\\x1b\[31m_loss', so"),
        (rb'{"step": 1, "gradient_norms": {"a\nb": 1}}', r"line 2 of .* a name that cannot be printed, 'a\\nb', so no"),
        (b'{"step": 1, "gradient_norms": {"layers": null}}', "line 2 of .* holds layers=None, which is no number"),
        (b'{"step": 1, "layers": {}}', "line 2 of .* holds layers that no training wrote"),
        (b'{"step": 1, "loss": "low"}', "line 2 of .* holds loss='low', which is no number"),
        (b'{"step": 1, "tokens_per_second": null}', "line 2 of .* holds tokens_per_second=None, which is no number"),
        (b'{"step": 1, "layers": [{"load": [1]}]}', "line 2 of .* holds layers that no training wrote"),
        (b'{"step": 1, "layers": 3}', "line 2 of .* holds layers that no training wrote"),
        (
            b'{"step": 1, "layers": [{"load": [1], "difficulty_mean": 1, "difficulty_variance": 1, '
            b'"router_entropy": 1, "mlstm_share": 1}]}',
            "line 2 of .* holds layers that no training wrote",
        ),
        (
            b'{"step": 1, "layers": [{"load": [1, 0], "difficulty_mean": "", "difficulty_variance": 1, '
            b'"router_entropy": 1, "mlstm_share": 1}]}',
            "line 2 of .* holds layers that no training wrote",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, sentence: str):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(training_line(1)).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=sentence):
        follower_of(path).read()


def test_the_warnings_are_those_that_the_training_prints():
    state, watch = RunState("run", {"model": {"load_balancing": "bias"}}), RoutingWatch({"load_balancing": "bias"})
    said = []
    for step in range(10, 300, 10):
        line = training_line(step, dead=20 < step < 250)
        layers = [RoutingStatistics(**layer) for layer in line["layers"]]
        expected = [f"step {step}: {sentence}" for sentence in watch.read(step, layers)]
        assert state.add(line, "here") == expected
        said += expected
    assert state.warnings == said
    assert len(said) == 2
    assert "model.balancing_bias_rate" in said[0]


@pytest.mark.parametrize(
    ("training", "step", "epoch", "expected"),
    [
        ({"max_steps": 400, "num_epochs": 1.0}, 10, 0.5, 400),
        ({"max_steps": -1, "num_epochs": 1.0}, 10, 10 / 545, 545),
        ({"max_steps": -1, "num_epochs": 2.5}, 600, 600 / 545, 1363),
        ({"max_steps": -1, "num_epochs": 3}, 1, 0.4, 9),  # 10 batches, 4 a step: the third step has 2
        ({"max_steps": -1, "num_epochs": 3}, 5, 1.8, 9),
        ({"max_steps": -1, "num_epochs": 2}, 1, 1e9, 2),  # an epoch has a step at least
        ({"max_steps": -1, "num_epochs": 1.0}, 10, 1e-320, None),
        ({"max_steps": -1, "num_epochs": math.nan}, 10, 0.5, None),
        ({"max_steps": -1, "num_epochs": math.inf}, 10, 0.5, None),
        ({"max_steps": -1, "num_epochs": 10**400}, 10, 0.5, None),
        ({"max_steps": -1, "num_epochs": 1e308}, 10, 1e-300, None),
        ({"max_steps": True, "num_epochs": 1.0}, 10, 0.5, 20),
        ({"max_steps": 10**400}, 10, 0.5, None),
        ({"max_steps": -1}, 10, 0.5, None),
        ({}, 10, 0.5, None),
    ],
)
def test_the_steps_of_the_whole_run(training: dict[str, Any], step: int, epoch: float, expected: int | None):
    state = RunState("run", {"training": training})
    state.add(training_line(step, epoch=epoch), "here")
    assert state.max_steps == expected


def test_before_the_first_line_only_the_settings_tell_the_steps_of_the_whole_run():
    assert RunState("run", RECIPE).max_steps == 400
    assert RunState("run", {"training": {"max_steps": -1, "num_epochs": 1.0}}).max_steps is None


def test_the_time_left_and_the_change():
    state = RunState("run", RECIPE)
    assert state.seconds_left is None
    assert state.change("loss") is None
    for step in range(10, 210, 10):
        state.add(training_line(step), "here")
    assert state.seconds_left == pytest.approx(200 * 100 / 1000, rel=1e-12)
    assert state.change("loss") == pytest.approx(-CHANGE_LINES * 10 / 100, rel=1e-9)
    state.add(
        {"step": 205, "tokens": 20500, "loss": math.nan, "gradient_norm": math.nan}, "here"
    )  # of a run that ended
    assert state.seconds_left is None
    assert math.isnan(state.change("loss") or 0)
    assert len(state.layers) == 1
