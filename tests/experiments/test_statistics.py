"""Planted effects get their verdicts, and runs that are no runs are counted and left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moxe.errors import UserError
from moxe.experiments.measures import MEASURES, Margins
from moxe.experiments.statistics import add_statistics
from tests.experiments.synthetic import diverge, fail, make_results, row_named


def test_planted_effects_get_their_verdicts():
    results = make_results()
    add_statistics(results, Margins())
    verdicts = {row["name"]: row["against_moxe"]["validation_loss"]["verdict"] for row in results["rows"][1:]}
    assert verdicts == {
        "xlstm": "equivalent",
        "gemma2": "worse",
        "qwen-moe": "worse",
        "standard": "worse",
        "no-group-loss": "equivalent",
        "feed-forward": "better",
        "noisy": "no difference found",
        "gamma-0": "worse",
        "gamma-2": "worse",
    }
    assert row_named(results, "moxe")["against_moxe"] == {}


def test_more_is_better_for_accuracy_and_speed():
    results = make_results()
    for run in row_named(results, "standard")["runs"]:
        run["tokens_per_second"] *= 2
        run["lambada_accuracy"] += 0.2
    add_statistics(results, Margins())
    against = row_named(results, "standard")["against_moxe"]
    assert against["tokens_per_second"]["verdict"] == against["lambada_accuracy"]["verdict"] == "better"
    assert against["tokens_per_second"]["mean"] == pytest.approx(2, rel=0.02)


def test_a_sure_difference_can_lie_within_the_margin():
    results = make_results()
    add_statistics(results, Margins(validation_loss=0.1))
    verdict = row_named(results, "gamma-0")["against_moxe"]["validation_loss"]["verdict"]
    assert verdict == "worse, but within the margin"


def test_numbers_are_those_of_the_plain_formulas():
    results = make_results()
    add_statistics(results, Margins())
    ours = [math.log(run["lambada_perplexity"]) for run in row_named(results, "standard")["runs"]]
    theirs = [math.log(run["lambada_perplexity"]) for run in row_named(results, "moxe")["runs"]]
    differences = np.subtract(ours, theirs)
    summary = row_named(results, "standard")["summary"]["lambada_perplexity"]
    against = row_named(results, "standard")["against_moxe"]["lambada_perplexity"]
    low, high = stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences))
    assert summary["mean"] == pytest.approx(stats.gmean(np.exp(ours)), rel=1e-12)
    assert (against["mean"], against["low"], against["high"]) == pytest.approx(
        (math.exp(differences.mean()), math.exp(low), math.exp(high)), rel=1e-10
    )
    assert against["p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-8)
    assert against["margin"] == pytest.approx(1.05)


def test_holm_runs_over_the_rows_of_one_section():
    """Two rows of the section gamma: the smaller p is doubled, whatever is in the other sections."""
    results = make_results(spread=0.02)
    add_statistics(results, Margins())
    family = [row_named(results, name)["against_moxe"]["validation_loss"] for name in ("gamma-0", "gamma-2")]
    low, high = sorted(family, key=lambda comparison: comparison["p"])
    assert low["holm_p"] == pytest.approx(min(1.0, 2 * low["p"]))
    assert high["holm_p"] == pytest.approx(max(min(1.0, 2 * low["p"]), high["p"]))


def test_rows_are_paired_by_seed_not_by_place():
    results, shuffled = make_results(), make_results()
    row_named(shuffled, "xlstm")["runs"].reverse()
    for one in (results, shuffled):
        add_statistics(one, Margins())
    straight, turned = (row_named(one, "xlstm")["against_moxe"]["validation_loss"] for one in (results, shuffled))
    assert turned["sd"] == pytest.approx(straight["sd"])
    assert straight["sd"] < 0.01 < row_named(results, "xlstm")["summary"]["validation_loss"]["sd"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_failed_missing_and_diverged_runs_are_counted_and_enter_no_mean(loss: float):
    results = make_results()
    row = row_named(results, "standard")
    fail(row, 0, "out of memory")
    row["runs"][1] = {"seed": 1, "status": "missing", "error": None}
    diverge(row, 2, loss)
    add_statistics(results, Margins())
    assert row["counts"] == {"done": 2, "diverged": 1, "failed": 1, "missing": 1}
    assert row["summary"]["validation_loss"]["seeds"] == [3, 4]
    against = row["against_moxe"]["validation_loss"]
    assert (against["n"], against["seeds"]) == (2, [3, 4])
    assert against["left_out"] == [
        "seed 0 of standard: failed",
        "seed 1 of standard: missing",
        "seed 2 of standard: diverged",
    ]
    assert all(math.isfinite(row["summary"][measure.key]["mean"]) for measure in MEASURES)


def test_a_diverged_run_of_moxe_leaves_the_pair_out():
    results = make_results()
    diverge(row_named(results, "moxe"), 3, math.nan)
    add_statistics(results, Margins())
    against = row_named(results, "xlstm")["against_moxe"]["validation_loss"]
    assert against["seeds"] == [0, 1, 2, 4]
    assert against["left_out"] == ["seed 3 of MoxE: diverged"]


def test_one_seed_gives_differences_and_no_tests():
    results = make_results(seeds=1)
    add_statistics(results, Margins())
    against = row_named(results, "gemma2")["against_moxe"]["validation_loss"]
    assert against["mean"] == pytest.approx(0.3, abs=0.02)
    assert (against["low"], against["p"], against["holm_p"]) == (None, None, None)
    assert (against["verdict"], against["why_untested"]) == ("not tested", "one seed has no spread to test against")


def test_rows_that_are_alike_to_the_bit_are_not_tested():
    results = make_results()
    for run, copied in zip(row_named(results, "xlstm")["runs"], row_named(results, "moxe")["runs"], strict=True):
        run["validation_loss"] = copied["validation_loss"]
    add_statistics(results, Margins())
    against = row_named(results, "xlstm")["against_moxe"]["validation_loss"]
    assert (against["verdict"], against["why_untested"]) == ("not tested", "the difference is the same for every seed")
    others = [row_named(results, name)["against_moxe"]["validation_loss"] for name in ("gemma2", "qwen-moe")]
    assert min(other["holm_p"] / other["p"] for other in others) == pytest.approx(1)  # a family of two, not of three
    assert max(other["holm_p"] / other["p"] for other in others) <= 2 + 1e-9


def test_a_row_or_a_reference_without_any_number_is_said():
    results = make_results(seeds=2)
    for seed in range(2):
        fail(row_named(results, "gemma2"), seed, "no memory")
    for run in row_named(results, "qwen-moe")["runs"]:
        run["lambada_perplexity"] = None
    add_statistics(results, Margins())
    assert row_named(results, "gemma2")["summary"]["validation_loss"]["n"] == 0
    assert row_named(results, "gemma2")["against_moxe"]["validation_loss"]["verdict"] == "not tested"
    assert row_named(results, "qwen-moe")["against_moxe"]["lambada_perplexity"]["left_out"][0].endswith("not measured")
    without = make_results(seeds=2)
    without["rows"] = [row for row in without["rows"] if not row["is_reference"]]
    add_statistics(without, Margins())
    assert all(row["against_moxe"] == {} for row in without["rows"])
    assert without["claims"] == []


def test_margins_and_rows_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="margin of lambada_accuracy is 0"):
        Margins(lambada_accuracy=0)
    twice = make_results(seeds=1)
    twice["rows"].append(row_named(twice, "xlstm"))
    with pytest.raises(UserError, match="more than one row is named 'xlstm'"):
        add_statistics(twice, Margins())
    seeds = make_results(seeds=2)
    row_named(seeds, "xlstm")["runs"][1]["seed"] = 0
    with pytest.raises(UserError, match="seed more than once"):
        add_statistics(seeds, Margins())
    references = make_results(seeds=1)
    row_named(references, "xlstm")["is_reference"] = True
    with pytest.raises(UserError, match="one row is the reference"):
        add_statistics(references, Margins())
