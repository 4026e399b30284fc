"""The paper's claims, each judged from the measured numbers in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moxe.experiments.inference import ALPHA, Estimate, paired_test
from moxe.experiments.measures import diverged, peak_memory, trained_on_gpu
from moxe.experiments.theory import LayerEstimate, expected_slope, odds_slopes, rarity_correlations

HOLDS, FAILS, OPEN, UNMEASURED = "holds", "does not hold", "not resolved", "not measured"
# Rows by name: what the claims are about.
_XLSTM, _NO_GROUP_LOSS = "xlstm", "no-group-loss"
_WITHOUT_BIAS = ("standard", "gamma-0")  # the controls of what is ascribed to the bias
# A slope this close to 2 gamma follows it.
_SLOPE_MARGIN = 0.1
# A last part of training whose load is averaged: a single batch is noise.
_SETTLED = 0.25
# The digest of the paper: lower latency, less memory, more efficiency than the baselines of equal size.
_LATENCY, _MEMORY, _EFFICIENCY = 0.37, 0.42, 0.20


def judge_claims(results: dict[str, Any]) -> list[dict[str, str]]:
    """The paper's claims in its order, each with a verdict and the numbers that decide.

    Verdicts: "holds" and "does not hold" where the numbers decide, "not resolved" where they do not suffice, "not
    measured" where there are none. A difference counts if Holm's p is below 5%, a tie if equivalence within the margin
    is shown at 5%.
    """
    rows = results["rows"]
    reference = next((row for row in rows if row["is_reference"]), None)
    if reference is None:
        return []
    rivals = [row for row in rows if _is_rival(row)]
    return [
        _lowest_loss(rivals),
        _lowest_perplexity(rivals),
        *(_part_matters(row) for row in rows if row["paper"].get("change_percent") is not None),
        _group_loss_evens(reference, next((row for row in rows if row["name"] == _NO_GROUP_LOSS), None)),
        _odds_follow(reference),
        _rare_tokens(reference, [row for row in rows if row["name"] in _WITHOUT_BIAS]),
        *_active_compute(reference, rivals, on_gpu=trained_on_gpu(results)),
    ]


def _is_rival(row: dict[str, Any]) -> bool:
    """The models of the paper's own Table 1, without MoxE."""
    in_table = "table1" in row["tables"] and row["paper"].get("parameters") is not None
    return in_table and not row["is_reference"]


def _claim(claim: str, verdict: str, because: str) -> dict[str, str]:
    return {"claim": claim, "verdict": verdict, "because": because}


def _lowest_loss(rivals: Sequence[dict[str, Any]]) -> dict[str, str]:
    claim = "MoxE and xLSTM tie for the lowest validation loss"
    compared, unknown = _compared(rivals, "validation_loss")
    because = _listed(compared, "validation_loss", unknown)
    words = {row["name"]: _comparison(row, "validation_loss")["verdict"] for row in compared}
    beaten = any(word == "better" for word in words.values())
    if beaten or words.get(_XLSTM) == "worse":
        return _claim(claim, FAILS, because)
    if unknown or not words or _XLSTM not in words:
        return _claim(claim, UNMEASURED, because)
    others_lose = all(word.startswith("worse") for name, word in words.items() if name != _XLSTM)
    return _claim(claim, HOLDS if _ties(words[_XLSTM]) and others_lose else OPEN, because)


def _ties(verdict: str) -> bool:
    return verdict == "equivalent" or verdict.endswith("within the margin")


def _lowest_perplexity(rivals: Sequence[dict[str, Any]]) -> dict[str, str]:
    claim = "MoxE has the lowest LAMBADA perplexity of the four"
    compared, unknown = _compared(rivals, "lambada_perplexity")
    because = _listed(compared, "lambada_perplexity", unknown)
    words = [_comparison(row, "lambada_perplexity")["verdict"] for row in compared]
    if any(word.startswith("better") for word in words):
        return _claim(claim, FAILS, because)
    if unknown or not words:
        return _claim(claim, UNMEASURED, because)
    return _claim(claim, HOLDS if all(word.startswith("worse") for word in words) else OPEN, because)


def _part_matters(row: dict[str, Any]) -> dict[str, str]:
    change = f"{row['paper']['change_percent']:+g}%"
    claim = f"{row['label']} has a higher LAMBADA perplexity than full MoxE (the paper: {change})"
    perplexity = _comparison(row, "lambada_perplexity")
    if perplexity["n"] == 0:
        return _claim(claim, UNMEASURED, "; ".join(perplexity["left_out"]) or "no run of it is there")
    because = f"{_told(row, 'lambada_perplexity')}; {_told(row, 'validation_loss')}"
    word = perplexity["verdict"]
    if word == "worse":
        return _claim(claim, HOLDS, because)
    return _claim(claim, FAILS if word.startswith("better") or _ties(word) else OPEN, because)


def _compared(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that share a seed's number with MoxE, and those that do not."""
    compared = [row for row in rows if _comparison(row, key)["n"]]
    return compared, [row for row in rows if not _comparison(row, key)["n"]]


def _comparison(row: dict[str, Any], key: str) -> dict[str, Any]:
    return row["against_moxe"][key]


def _listed(compared: Sequence[dict[str, Any]], key: str, unknown: Sequence[dict[str, Any]]) -> str:
    parts = [_told(row, key) for row in compared]
    if unknown:
        parts.append(f"no number for {', '.join(row['label'] for row in unknown)}")
    return "; ".join(parts) or "none of the other models of Table 1 was run"


def _told(row: dict[str, Any], key: str) -> str:
    """One comparison with MoxE, in words and numbers."""
    comparison = _comparison(row, key)
    if comparison["mean"] is None:
        return f"{row['label']}: no {_SHORT[key]}"
    ratio = comparison["kind"] == "ratio"
    show = "{:,.3f}".format if ratio else "{:+z.4f}".format
    interval = "" if comparison["low"] is None else f" [{show(comparison['low'])}, {show(comparison['high'])}]"
    amount = f"{show(comparison['mean'])}{interval}{' times' if ratio else ' nats'}"
    p = "" if comparison["holm_p"] is None else f", Holm p {comparison['holm_p']:.2g}"
    against = "that of MoxE" if ratio else "from MoxE"
    return f"{row['label']}: {_SHORT[key]} {amount} {against}, n {comparison['n']}{p}: {comparison['verdict']}"


_SHORT = {"validation_loss": "validation loss", "lambada_perplexity": "LAMBADA perplexity"}


def _group_loss_evens(reference: dict[str, Any], without: dict[str, Any] | None) -> dict[str, str]:
    claim = "The group loss evens the utilisation of the experts"
    ours, theirs = unevenness(reference), unevenness(without) if without else {}
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return _claim(claim, UNMEASURED, "the load with and without the group loss is not known for any common seed")
    tested = paired_test([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], margin=1.0)
    mean_ours, mean_theirs = (float(np.mean([side[seed] for seed in seeds])) for side in (ours, theirs))
    because = (
        f"the spread of the load over experts is {mean_ours:.3f} of its mean with the loss, {mean_theirs:.3f} without"
        f"{_interval_words(tested.estimate)}, n {len(seeds)}"
    )
    if tested.p is None:
        return _claim(claim, OPEN, f"{because}; {tested.why_untested}")
    because += f", p {tested.p:.2g}"
    if tested.p >= ALPHA:
        return _claim(claim, OPEN, because)
    return _claim(claim, HOLDS if tested.estimate.mean < 0 else FAILS, because)


def unevenness(row: dict[str, Any]) -> dict[int, float]:
    """By seed, the coefficient of variation of the load over a layer's experts: 0 when even.

    The load is averaged over the last quarter of the lines, the coefficient over layers.
    """
    found = {}
    for run in row["runs"]:
        load = (run.get("curves") or {}).get("load")
        if run["status"] != "done" or diverged(run) or not load:
            continue
        settled = np.asarray(load, dtype=np.float64)[-max(1, round(_SETTLED * len(load))) :].mean(axis=0)  # [layer, E]
        value = float((settled.std(axis=-1) / settled.mean(axis=-1)).mean())
        if math.isfinite(value):
            found[run["seed"]] = value
    return found


def _interval_words(difference: Estimate) -> str:
    if difference.low is None:
        return ""
    return f" (difference {difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}])"


def _odds_follow(reference: dict[str, Any]) -> dict[str, str]:
    claim = "The odds of an mLSTM expert follow exp(2 gamma d)"
    expected, slopes = expected_slope(reference), odds_slopes(reference)
    if expected is None or not slopes:
        return _claim(claim, UNMEASURED, "no run of MoxE was analysed")
    because = f"2 gamma is {expected:g}; the slope of log(P_M/P_S) on d is {_by_layer(slopes)}"
    near, far = (1 - _SLOPE_MARGIN) * expected, (1 + _SLOPE_MARGIN) * expected
    if any(slope.lies_outside(near, far) for slope in slopes):
        return _claim(claim, FAILS, because)
    return _claim(claim, HOLDS if all(slope.lies_within(near, far) for slope in slopes) else OPEN, because)


def _rare_tokens(reference: dict[str, Any], controls: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Judged over seeds: frequent words go where they like, so one model shows some correlation by chance."""
    claim = "Rare tokens go to mLSTM experts"
    correlations = rarity_correlations(reference)
    if not correlations:
        return _claim(claim, UNMEASURED, "no run of MoxE was analysed for it")
    because = f"the rank correlation of rarity with the share of mLSTM experts is {_by_layer(correlations)}"
    for row in controls:
        if without := rarity_correlations(row):
            because += f"; without the bias, in {row['label']}, it is {_by_layer(without)}"
    if any(found.seeds < 2 for found in correlations):
        return _claim(claim, OPEN, f"{because}; one seed does not tell it from chance")
    if any(found.lies_outside(0, math.inf) for found in correlations):
        return _claim(claim, FAILS, because)
    above = all(found.lies_outside(-math.inf, 0) for found in correlations)
    return _claim(claim, HOLDS if above else OPEN, because)


def _by_layer(layers: Sequence[LayerEstimate]) -> str:
    return ", ".join(
        f"{found.mean:.2f}{'' if found.low is None else f' [{found.low:.2f}, {found.high:.2f}]'} in layer {found.layer}"
        for found in layers
    )


def _active_compute(
    reference: dict[str, Any], rivals: Sequence[dict[str, Any]], *, on_gpu: bool
) -> list[dict[str, str]]:
    """Latency is that of generation, efficiency the tokens a second of training, memory the peak of a training."""
    less_memory = f"MoxE takes {_MEMORY:.0%} less memory than the baselines"
    return [
        _saving(f"MoxE has {_LATENCY:.0%} lower latency than the baselines", reference, rivals, _latency, _LATENCY),
        _saving(less_memory, reference, rivals, peak_memory, _MEMORY)
        if on_gpu
        else _claim(
            less_memory,
            UNMEASURED,
            "on a CPU the peak is that of the whole process, of which the libraries are a large part; a GPU is needed",
        ),
        # A 20% higher speed is a latency lower by 1 - 1/1.2.
        _saving(
            f"MoxE is over {_EFFICIENCY:.0%} more efficient than the baselines",
            reference,
            rivals,
            _seconds_a_token,
            1 - 1 / (1 + _EFFICIENCY),
        ),
    ]


def _saving(
    claim: str,
    reference: dict[str, Any],
    rivals: Sequence[dict[str, Any]],
    cost: Callable[[dict[str, Any]], float | None],
    part: float,
) -> dict[str, str]:
    own = cost(reference)
    known = [(row, theirs) for row in rivals if (theirs := cost(row)) is not None]
    if own is None or not known:
        return _claim(claim, UNMEASURED, "it was not measured for MoxE and another model of Table 1")
    words = [f"{1 - own / theirs:+.1%} against {row['label']}" for row, theirs in known]
    holds = all(1 - own / theirs >= part for _, theirs in known)
    because = f"saved {', '.join(words)} (needed: {part:+.1%}; point estimates)"
    if holds and len(known) < len(rivals):
        return _claim(claim, UNMEASURED, f"{because}; not every model of Table 1 was measured")
    return _claim(claim, HOLDS if holds else FAILS, because)


def _latency(row: dict[str, Any]) -> float | None:
    return (row.get("speed") or {}).get("seconds_a_generated_token")


def _seconds_a_token(row: dict[str, Any]) -> float | None:
    speed = (row.get("speed") or {}).get("tokens_per_second")
    return 1 / speed if speed else None
