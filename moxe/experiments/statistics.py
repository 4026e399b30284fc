"""Summaries over seeds, and every row against full MoxE.

A seed fixes the order of the data and its windows for every row alike, so rows are paired by seed. The initial weights
are the same only for rows with the same parameters in the same order.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moxe.errors import UserError
from moxe.experiments.claims import judge_claims
from moxe.experiments.inference import ALPHA, estimate, holm, paired_test
from moxe.experiments.measures import MEASURES, Margins, Measure, diverged, values_by_seed, why_without
from moxe.experiments.wall_clock import equal_times


def add_statistics(results: dict[str, Any], margins: Margins) -> None:
    """Fills in what follows from the runs, in place.

    Every row gets `counts` (runs done, diverged, failed, missing), `summary` (by measure: n, mean, 95% t-interval, sd,
    values; geometric where the measure is logarithmic, with the sd that of the logarithm) and, but for the reference,
    `against_moxe` (by measure: the mean paired difference, or ratio where the measure is logarithmic, its 95% interval,
    the two-sided p, Holm's p over the rows of the same section, the p of equivalence within the margin, the smallest
    difference detectable with 80% power, a verdict). `results` itself gets `margins`, `equal_time` and `claims`.
    A run that diverged counts as such and enters no mean.

    Raises:
        UserError: if two rows bear one name, a row has a seed twice, or there is more than one reference.
    """
    rows = results["rows"]
    _check(rows)
    reference = next((row for row in rows if row["is_reference"]), None)
    results["margins"] = asdict(margins)
    for row in rows:
        row["counts"] = _counts(row)
        row["summary"] = {measure.key: _summary(row, measure) for measure in MEASURES}
        row["against_moxe"] = {}
    if reference is not None:
        others = [row for row in rows if row is not reference]
        for measure in MEASURES:
            for row in others:
                row["against_moxe"][measure.key] = _against(row, reference, measure, margins)
            for section in dict.fromkeys(row["section"] for row in others):
                family = [row["against_moxe"][measure.key] for row in others if row["section"] == section]
                _judge_family(family, measure)
    results["equal_time"] = equal_times(results)
    results["claims"] = judge_claims(results)


def _check(rows: list[dict[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"more than one row is named {sorted(twice)[0]!r}")
    for row in rows:
        seeds = [run["seed"] for run in row["runs"]]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"row {row['name']!r} holds a seed more than once: {seeds}")
    references = [row["name"] for row in rows if row["is_reference"]]
    if len(references) > 1:
        raise UserError(f"one row is the reference, not {', '.join(map(repr, references))}")


def _counts(row: dict[str, Any]) -> dict[str, int]:
    runs = row["runs"]
    return {
        "done": sum(run["status"] == "done" and not diverged(run) for run in runs),
        "diverged": sum(diverged(run) for run in runs),
        "failed": sum(run["status"] == "failed" for run in runs),
        "missing": sum(run["status"] == "missing" for run in runs),
    }


def _summary(row: dict[str, Any], measure: Measure) -> dict[str, Any]:
    values = values_by_seed(row, measure)
    if not values:
        return {"n": 0, "mean": None, "low": None, "high": None, "sd": None, "seeds": [], "values": []}
    found = estimate(list(values.values()))
    return {
        "n": found.n,
        "mean": measure.unscaled(found.mean),
        "low": None if found.low is None else measure.unscaled(found.low),
        "high": None if found.high is None else measure.unscaled(found.high),
        "sd": found.sd,
        "seeds": list(values),
        "values": [measure.unscaled(value) for value in values.values()],
    }


def _against(row: dict[str, Any], reference: dict[str, Any], measure: Measure, margins: Margins) -> dict[str, Any]:
    ours, theirs = values_by_seed(row, measure), values_by_seed(reference, measure)
    seeds = [seed for seed in ours if seed in theirs]
    comparison: dict[str, Any] = {
        "n": len(seeds),
        "seeds": seeds,
        "left_out": _left_out(row, reference, measure),
        "kind": "ratio" if measure.logarithmic else "difference",
        "mean": None,
        "low": None,
        "high": None,
        "sd": None,
        "p": None,
        "holm_p": None,
        "equivalence_p": None,
        "margin": _shown_margin(margins, measure),
        "detectable": None,
        "why_untested": "no seed has a number in both rows",
    }
    if seeds:
        tested = paired_test([ours[s] for s in seeds], [theirs[s] for s in seeds], margins.scaled(measure))
        found = tested.estimate
        comparison |= {
            "mean": measure.unscaled(found.mean),
            "low": None if found.low is None else measure.unscaled(found.low),
            "high": None if found.high is None else measure.unscaled(found.high),
            "sd": found.sd,
            "p": tested.p,
            "equivalence_p": tested.equivalence_p,
            "detectable": None if tested.detectable is None else measure.unscaled(tested.detectable),
            "why_untested": tested.why_untested,
        }
    return comparison


def _shown_margin(margins: Margins, measure: Measure) -> float:
    """The margin as a difference, or as a ratio where the measure is compared by ratios."""
    return measure.unscaled(margins.scaled(measure))


def _left_out(row: dict[str, Any], reference: dict[str, Any], measure: Measure) -> list[str]:
    """Why seeds are missing from a comparison, in words."""
    return [
        f"seed {run['seed']} of {side['label']}: {why}"
        for side in (row, reference)
        for run in side["runs"]
        if (why := why_without(run, measure))
    ]


def _judge_family(family: list[dict[str, Any]], measure: Measure) -> None:
    tested = [comparison for comparison in family if comparison["p"] is not None]
    for comparison, adjusted in zip(tested, holm([comparison["p"] for comparison in tested]), strict=True):
        comparison["holm_p"] = adjusted
    for comparison in family:
        comparison["verdict"] = _verdict(comparison, measure)


def _verdict(comparison: dict[str, Any], measure: Measure) -> str:
    if comparison["p"] is None:
        return "not tested"
    equivalent = comparison["equivalence_p"] < ALPHA
    if comparison["holm_p"] < ALPHA:
        lower = comparison["mean"] < (1 if measure.logarithmic else 0)
        word = "better" if lower == measure.lower_is_better else "worse"
        return f"{word}, but within the margin" if equivalent else word
    return "equivalent" if equivalent else "no difference found"
