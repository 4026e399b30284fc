"""Rows at equal wall-clock time: what each had learned when another had finished.

A row's validation loss is read off its own curve, linearly between the points. Learning rates are not annealed there:
a curve cut short is above what a run planned for that time would have reached; and a line between two validations lies
above a convex curve. Both favour the rows that are finished, the fast ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moxe.experiments.inference import estimate
from moxe.experiments.measures import diverged


def equal_times(results: dict[str, Any]) -> dict[str, Any]:
    """By section: the finishing times, the losses at two common times, and the Pareto front of (time, loss).

    A section's rows are those of the section or of the table of that name, and the reference. The two times are those
    at which the fastest of these rows and the reference finished. Times follow from `speed`, of a row alone on the
    machine, if all rows that finished have it, else from the runs' own: the two do not compare. A row is on the front
    if no other has both at most its time and at most its loss, one of them less; means over seeds decide.
    """
    rows = results["rows"]
    sections = dict.fromkeys(row["section"] for row in rows)
    return {section: _equal_time(members_of(rows, section)) for section in sections}


def members_of(rows: list[dict[str, Any]], section: str) -> list[dict[str, Any]]:
    """The reference first, then the rows of a section or of the table of that name, in their order."""
    members = [row for row in rows if row["section"] == section or section in row["tables"]]
    return [row for row in rows if row["is_reference"]] + [row for row in members if not row["is_reference"]]


def has_others(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the members of a section are more than the reference: else its table was not run."""
    return any(not row["is_reference"] for row in rows)


def _equal_time(rows: list[dict[str, Any]]) -> dict[str, Any]:
    alone = all(row.get("speed") for row in rows if any(map(_usable, row["runs"])))
    timed = [point for row in rows if (point := _finish(row, alone)) is not None]
    if not timed:
        return {"finished": [], "at": []}
    for point in timed:
        point["on_front"] = not any(_dominates(other, point) for other in timed)
    fastest = min(timed, key=lambda point: point["seconds"])
    ends = {fastest["name"]: fastest["seconds"]}
    reference = next((row["name"] for row in rows if row["is_reference"]), None)
    ends |= {point["name"]: point["seconds"] for point in timed if point["name"] == reference}
    losses = [
        {
            "row": name,
            "seconds": seconds,
            "losses": {row["name"]: loss for row in rows if (loss := _loss_at(row, seconds, alone)) is not None},
        }
        for name, seconds in ends.items()
    ]
    return {"finished": timed, "at": losses}


def _finish(row: dict[str, Any], alone: bool) -> dict[str, Any] | None:
    """Mean time and mean final loss of a row; None if either is unknown."""
    runs = [run for run in row["runs"] if _usable(run) and _speed(row, run, alone)]
    if not runs:
        return None
    return {
        "name": row["name"],
        "seconds": float(np.mean([run["tokens"] / _speed(row, run, alone) for run in runs])),
        "loss": float(np.mean([run["validation_loss"] for run in runs])),
    }


def _loss_at(row: dict[str, Any], seconds: float, alone: bool) -> dict[str, Any] | None:
    """The estimate over seeds of the loss after so many seconds; None where a curve had not begun."""
    losses = [
        loss
        for run in row["runs"]
        if _usable(run) and (speed := _speed(row, run, alone)) and (loss := _read_off(run, seconds * speed)) is not None
    ]
    return asdict(estimate(losses)) if losses else None


def _read_off(run: dict[str, Any], tokens: float) -> float | None:
    curve = (run.get("curves") or {}).get("validation") or {"tokens": [], "lm_loss": []}
    points = {
        where: loss
        for where, loss in zip(curve["tokens"], curve["lm_loss"], strict=True)
        if loss is not None and math.isfinite(loss)
    }
    points[run["tokens"]] = run["validation_loss"]
    where = sorted(points)
    if tokens < where[0] * (1 - 1e-9):  # the time at which this very run ended comes back rounded
        return None
    return float(np.interp(tokens, where, [points[place] for place in where]))


def _speed(row: dict[str, Any], run: dict[str, Any], alone: bool) -> float | None:
    """Tokens a second: of the row alone on the machine, or as the run went beside others."""
    speed = (row["speed"] if alone else run).get("tokens_per_second")
    return speed if speed and math.isfinite(speed) and speed > 0 else None


def _usable(run: dict[str, Any]) -> bool:
    return run["status"] == "done" and run.get("validation_loss") is not None and not diverged(run)


def _dominates(other: dict[str, Any], point: dict[str, Any]) -> bool:
    no_worse = other["seconds"] <= point["seconds"] and other["loss"] <= point["loss"]
    return no_worse and (other["seconds"] < point["seconds"] or other["loss"] < point["loss"])
