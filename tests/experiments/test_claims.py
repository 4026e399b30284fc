"""Each claim holds, fails or stays open by what was planted, and says so with the numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moxe.experiments.measures import Margins
from moxe.experiments.statistics import add_statistics
from tests.experiments.synthetic import fail, make_results, row_named

TIE, LOWEST = "MoxE and xLSTM tie", "MoxE has the lowest LAMBADA"
EVEN, ODDS, RARE = "The group loss evens", "The odds of an mLSTM expert", "Rare tokens"
LATENCY, MEMORY, EFFICIENCY = "MoxE has 37%", "MoxE takes 42%", "MoxE is over 20%"


def judged(results: dict[str, Any], beginning: str) -> dict[str, str]:
    add_statistics(results, Margins())
    (found,) = [claim for claim in results["claims"] if claim["claim"].startswith(beginning)]
    return found


def shift(row: dict[str, Any], nats: float) -> None:
    for run in row["runs"]:
        run["validation_loss"] += nats
        run["lambada_perplexity"] *= math.exp(10 * nats)


def test_the_tie_holds_where_it_was_planted_and_fails_where_xlstm_or_another_wins():
    assert judged(make_results(), TIE)["verdict"] == "holds"
    for name, nats in [("xlstm", 0.1), ("xlstm", -0.1), ("gemma2", -0.5)]:
        results = make_results()
        shift(row_named(results, name), nats)
        assert judged(results, TIE)["verdict"] == "does not hold"


def test_the_tie_stays_open_with_one_seed_and_is_not_measured_without_xlstm():
    assert judged(make_results(seeds=1), TIE)["verdict"] == "not resolved"
    results = make_results()
    for seed in range(5):
        fail(row_named(results, "xlstm"), seed, "no memory")
    claim = judged(results, TIE)
    assert claim["verdict"] == "not measured"
    assert "no number for xLSTM" in claim["because"]


def test_the_lowest_perplexity_holds_only_against_all_three():
    assert judged(make_results(), LOWEST)["verdict"] == "not resolved"
    results = make_results()
    shift(row_named(results, "xlstm"), 0.1)
    assert judged(results, LOWEST)["verdict"] == "holds"
    results = make_results()
    shift(row_named(results, "xlstm"), -0.1)
    assert judged(results, LOWEST)["verdict"] == "does not hold"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("standard", "holds"),
        ("no-group-loss", "does not hold"),
        ("feed-forward", "does not hold"),
        ("noisy", "not resolved"),
    ],
)
def test_a_part_of_table_2_matters_if_it_was_planted_to(name: str, verdict: str):
    results = make_results()
    claim = judged(results, f"{name} has a higher")
    assert claim["verdict"] == verdict
    against = row_named(results, name)["against_moxe"]["lambada_perplexity"]
    assert f"{against['mean']:,.3f} [{against['low']:,.3f}, {against['high']:,.3f}] times" in claim["because"]


def test_a_part_that_is_worse_within_the_margin_does_not_matter():
    results = make_results(spread=1e-4)
    shift(row_named(results, "no-group-loss"), 0.002)  # 3% of the perplexity in all; the margin is 5%
    claim = judged(results, "no-group-loss has a higher")
    word = row_named(results, "no-group-loss")["against_moxe"]["lambada_perplexity"]["verdict"]
    assert (word, claim["verdict"]) == ("worse, but within the margin", "does not hold")


def test_the_group_loss_evens_the_load_or_does_not():
    claim = judged(make_results(), EVEN)
    assert claim["verdict"] == "holds"
    # Planted shares 0.45, 0.1833 three times: sd 0.1155 of a mean of 0.25.
    assert "0.46" in claim["because"]
    turned = make_results()
    ours, theirs = (row_named(turned, name)["runs"] for name in ("moxe", "no-group-loss"))
    for one, other in zip(ours, theirs, strict=True):
        one["curves"]["load"], other["curves"]["load"] = other["curves"]["load"], one["curves"]["load"]
    assert judged(turned, EVEN)["verdict"] == "does not hold"
    assert judged(make_results(seeds=1), EVEN)["verdict"] == "not resolved"
    without = make_results()
    without["rows"] = [row for row in without["rows"] if row["name"] != "no-group-loss"]
    assert judged(without, EVEN)["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("slope", "seeds", "verdict"), [(1.4, 5, "holds"), (4.0, 5, "does not hold"), (4.0, 1, "does not hold")]
)
def test_the_odds_follow_2_gamma_if_the_slope_was_planted_so(slope: float, seeds: int, verdict: str):
    claim = judged(make_results(slope=slope, seeds=seeds), ODDS)
    assert claim["verdict"] == verdict
    assert "2 gamma is 1.4" in claim["because"]
    assert f"{slope:.1f}" in claim["because"]


def test_a_slope_with_a_wide_interval_stays_open():
    results = make_results(slope=1.4, seeds=1)
    for layer in row_named(results, "moxe")["runs"][0]["analysis"]["layers"]:
        layer["difficulty"]["odds_slope"] |= {"low": 0.4, "high": 2.4}
    assert judged(results, ODDS)["verdict"] == "not resolved"


def test_rare_tokens_are_judged_by_every_layer():
    assert judged(make_results(), RARE)["verdict"] == "holds"
    results = make_results()
    for run in row_named(results, "moxe")["runs"]:
        run["analysis"]["layers"][1]["share_with_rarity"]["value"] *= -1
    assert judged(results, RARE)["verdict"] == "does not hold"
    unmeasured = make_results()
    for run in row_named(unmeasured, "moxe")["runs"]:
        run["analysis"] = None
    assert judged(unmeasured, RARE)["verdict"] == judged(unmeasured, ODDS)["verdict"] == "not measured"


def test_rare_tokens_need_two_seeds_and_an_interval_may_pass_the_end_of_the_scale():
    claim = judged(make_results(seeds=1), RARE)
    assert claim["verdict"] == "not resolved"
    assert "one seed" in claim["because"]
    for sign, verdict in ((1, "holds"), (-1, "does not hold")):
        results = make_results(seeds=2)
        for run, value in zip(row_named(results, "moxe")["runs"], (0.85, 0.89), strict=True):
            for layer in run["analysis"]["layers"]:
                layer["share_with_rarity"]["value"] = sign * value
        claim = judged(results, RARE)
        assert claim["verdict"] == verdict
        assert "1.12" in claim["because"]  # the interval's end


def test_rare_tokens_are_told_beside_the_models_without_the_bias():
    results = make_results()
    for name in ("standard", "gamma-0"):
        for run, copied in zip(row_named(results, name)["runs"], row_named(results, "moxe")["runs"], strict=True):
            layers = [{"share_with_rarity": {"value": 0.25}, "difficulty": None} for _ in copied["analysis"]["layers"]]
            run["analysis"] = copied["analysis"] | {"layers": layers}
    because = judged(results, RARE)["because"]
    for name in ("standard", "gamma-0"):
        assert f"in {name}, it is 0.25 [0.25, 0.25] in layer 0" in because


def test_memory_is_judged_on_a_gpu_alone():
    results = make_results()
    claim = judged(results, MEMORY)
    assert claim["verdict"] == "not measured"
    assert "on a CPU" in claim["because"]
    results["machine"]["device"] = "cuda"
    assert judged(results, MEMORY)["verdict"] == "holds"  # half of it


def test_active_compute_is_judged_against_every_rival_that_was_measured():
    results = make_results()
    assert judged(results, LATENCY)["verdict"] == "does not hold"  # xLSTM is the faster one
    row_named(results, "xlstm")["speed"]["tokens_per_second"] = 1500.0  # a quarter less than MoxE
    row_named(results, "qwen-moe")["speed"] = {"tokens_per_second": 1000.0, "threads": 1}
    assert judged(results, LATENCY)["verdict"] == "does not hold"  # generation has its own measure
    assert judged(results, EFFICIENCY)["verdict"] == "holds"
    row_named(results, "qwen-moe")["speed"] = None
    assert judged(results, EFFICIENCY)["verdict"] == "not measured"
    row_named(results, "moxe")["speed"] = None
    assert judged(results, LATENCY)["verdict"] == "not measured"
