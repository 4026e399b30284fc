"""The answer to a question: a table to read, and every figure with all its samples to keep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moxe.benchmarks.timing import Samples


class CheckFailed(Exception):
    """What was to be timed does not compute what it should."""


@dataclass(frozen=True)
class Figure:
    """One measured quantity of one side.

    Args:
        side: whose it is.
        quantity: what was measured, with its unit.
        samples: every measured value.
        about: the circumstances: shape, setting, context.
    """

    side: str
    quantity: str
    samples: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_dict(self) -> dict[str, Any]:
        own = {"side": self.side, "quantity": self.quantity, **self.about, "median": self.median}
        return {**own, "lowest": min(self.samples), "highest": max(self.samples), "samples": list(self.samples)}


@dataclass
class Report:
    """The answer to one question.

    Args:
        question: its name.
        title: what stands above the table.
        columns, rows: the table.
        check: what was found correct before anything was timed.
        notes: what stands below the table.
        figures: everything measured.
        failed: why there are no figures; None when there are.
    """

    question: str
    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    check: str = ""
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    failed: str | None = None

    def add_row(self, *cells: str) -> None:
        self.rows.append(list(cells))

    def add_timing(self, side: str, samples: Samples, **about: Any) -> None:
        self.figures.append(Figure(side, "milliseconds", tuple(1e3 * s for s in samples.seconds), about))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "figures": [figure.to_dict() for figure in self.figures]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        derived = {"side", "quantity", "samples", "median", "lowest", "highest"}
        figures = [
            Figure(
                figure["side"],
                figure["quantity"],
                tuple(figure["samples"]),
                {name: value for name, value in figure.items() if name not in derived},
            )
            for figure in data["figures"]
        ]
        return cls(**{**data, "figures": figures})


def merged(parts: Sequence[Report]) -> Report:
    """One report of several on the same question, in their order."""
    first = parts[0]
    failures = list(dict.fromkeys(part.failed for part in parts if part.failed))
    return Report(
        question=first.question,
        title=first.title,
        columns=next((part.columns for part in parts if part.columns), []),
        rows=[row for part in parts for row in part.rows],
        check="; ".join(dict.fromkeys(part.check for part in parts if part.check)),
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        figures=[figure for part in parts for figure in part.figures],
        failed="; ".join(failures) or None,
    )


def milliseconds(samples: Samples) -> str:
    """Median and range, such as `12.3 (11.9-13.0)`."""
    return spread([1e3 * s for s in samples.seconds])


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest of some values."""
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
