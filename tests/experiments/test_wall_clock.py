"""Losses at equal time are read off the curves, and the front holds what nothing beats."""

from __future__ import annotations

import math

import pytest

from moxe.experiments.wall_clock import equal_times
from tests.experiments.synthetic import TOKENS, diverge, fail, make_results, row_named


def test_losses_are_read_linearly_off_the_curve_at_the_end_of_the_fastest_and_of_moxe():
    """xLSTM makes 3500 tokens/s, MoxE 2000, Gemma 2 1000; the curve is loss + log(T/t) between eighths of T."""
    results = make_results(seeds=1)
    at_fastest, at_moxe = equal_times(results)["table1"]["at"]
    assert (at_fastest["row"], at_moxe["row"]) == ("xlstm", "moxe")
    assert (at_fastest["seconds"], at_moxe["seconds"]) == pytest.approx((TOKENS / 3500, TOKENS / 2000))
    final = {row["name"]: row["runs"][0]["validation_loss"] for row in results["rows"]}
    assert at_fastest["losses"]["xlstm"]["mean"] == pytest.approx(final["xlstm"])
    assert at_moxe["losses"]["xlstm"]["mean"] == pytest.approx(final["xlstm"])  # finished before, stays
    assert at_moxe["losses"]["gemma2"]["mean"] == pytest.approx(final["gemma2"] + math.log(2))  # half of its tokens
    position = 8 * 2000 / 3500  # in eighths of the tokens
    whole = math.floor(position)
    left, right = math.log(8 / whole), math.log(8 / (whole + 1))
    expected = final["moxe"] + left + (position - whole) * (right - left)
    assert at_fastest["losses"]["moxe"]["mean"] == pytest.approx(expected)


def test_a_curve_that_had_not_begun_is_not_extrapolated():
    results = make_results(seeds=1)
    row_named(results, "gemma2")["speed"]["tokens_per_second"] = 100.0
    at_fastest, _ = equal_times(results)["table1"]["at"]
    assert "gemma2" not in at_fastest["losses"]
    assert "moxe" in at_fastest["losses"]


def test_where_one_row_was_not_timed_alone_the_runs_speeds_count_for_all():
    results = make_results(seeds=2)
    row_named(results, "qwen-moe")["speed"] = None
    finished = {point["name"]: point for point in equal_times(results)["table1"]["finished"]}
    for name in ("qwen-moe", "xlstm"):
        runs = row_named(results, name)["runs"]
        expected = sum(TOKENS / run["tokens_per_second"] for run in runs) / 2
        assert finished[name]["seconds"] == pytest.approx(expected)


def test_a_row_that_did_not_finish_needs_no_speed():
    results = make_results(seeds=1)
    row_named(results, "qwen-moe")["speed"] = None
    fail(row_named(results, "qwen-moe"), 0, "no memory")
    finished = {point["name"]: point for point in equal_times(results)["table1"]["finished"]}
    assert finished["xlstm"]["seconds"] == pytest.approx(TOKENS / 3500)


def test_the_front_holds_what_no_other_beats_in_time_and_loss():
    results = make_results(seeds=2)
    for run in row_named(results, "moxe")["runs"]:
        run["validation_loss"] -= 0.1  # slower than xLSTM, and better
    front = {point["name"] for point in equal_times(results)["table1"]["finished"] if point["on_front"]}
    assert front == {"xlstm", "moxe"}


def test_diverged_runs_and_losses_are_not_read():
    results = make_results(seeds=2)
    diverge(row_named(results, "moxe"), 0, math.nan)
    row_named(results, "moxe")["runs"][1]["curves"]["validation"]["lm_loss"][3] = math.inf
    at_fastest, _ = equal_times(results)["table1"]["at"]
    assert at_fastest["losses"]["moxe"]["n"] == 1
    assert math.isfinite(at_fastest["losses"]["moxe"]["mean"])


def test_no_run_at_all_gives_no_times():
    results = make_results(seeds=1)
    for row in results["rows"]:
        row["runs"] = []
    assert equal_times(results)["table1"] == {"finished": [], "at": []}
