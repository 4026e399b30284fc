"""What is measured of a run, and how large a difference in it matters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moxe.errors import UserError


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Args:
        key: its key in a run, and that of its margin in `Margins`.
        label: its name with its unit.
        lower_is_better: what "better" means.
        logarithmic: it is compared by ratios: means are geometric, tests are on logarithms.
        digits: decimals it is shown with.
    """

    key: str
    label: str
    lower_is_better: bool
    logarithmic: bool
    digits: int

    def scaled(self, value: float) -> float:
        """The value on the scale on which it is averaged and tested."""
        return math.log(value) if self.logarithmic else value

    def unscaled(self, value: float) -> float:
        """Back from `scaled`; a mean of logarithms becomes a geometric mean, a difference of them a ratio."""
        if not self.logarithmic:
            return value
        return math.exp(value) if value < math.log(1e300) else math.inf


MEASURES = (
    Measure("validation_loss", "validation loss, nats a token", True, False, 4),
    Measure("bits_per_byte", "bits a byte", True, False, 4),
    Measure("lambada_perplexity", "LAMBADA perplexity, last word", True, True, 1),
    Measure("lambada_token_perplexity", "LAMBADA perplexity, last token", True, True, 1),
    Measure("lambada_accuracy", "LAMBADA accuracy", False, False, 4),
    Measure("tokens_per_second", "training tokens a second", False, True, 0),
)


@dataclass(frozen=True)
class Margins:
    """Differences that do not matter: two models closer than this are equivalent.

    Args:
        validation_loss: nats a token.
        bits_per_byte: bits a byte.
        lambada_perplexity, lambada_token_perplexity, tokens_per_second: part by which a ratio may exceed 1.
        lambada_accuracy: part of the examples.

    Raises:
        UserError: if a margin is not a positive number.
    """

    validation_loss: float = 0.02
    bits_per_byte: float = 0.01
    lambada_perplexity: float = 0.05
    lambada_token_perplexity: float = 0.05
    lambada_accuracy: float = 0.01
    tokens_per_second: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise UserError(f"the margin of {field.name} is {value!r}; it must be a positive number")

    def scaled(self, measure: Measure) -> float:
        """The margin on the measure's own scale: 5% becomes log 1.05."""
        margin = getattr(self, measure.key)
        return math.log1p(margin) if measure.logarithmic else margin


def value_of(run: Mapping[str, Any], measure: Measure) -> float | None:
    """The run's number on the measure's scale; None where `why_without` says why there is none."""
    return None if why_without(run, measure) else measure.scaled(run[measure.key])


def why_without(run: Mapping[str, Any], measure: Measure) -> str | None:
    """Why a run has no usable number: failed, missing, diverged or not measured; None if it has one."""
    if run["status"] != "done":
        return run["status"]
    if diverged(run):
        return "diverged"
    value = run.get(measure.key)
    if value is None:
        return "not measured"
    usable = math.isfinite(value) and (value > 0 or not measure.logarithmic)
    return None if usable else f"not usable ({value:g})"


def diverged(run: Mapping[str, Any]) -> bool:
    """A run that came to its end with a loss that is not finite."""
    loss = run.get("validation_loss")
    return run["status"] == "done" and loss is not None and not math.isfinite(loss)


def values_by_seed(row: Mapping[str, Any], measure: Measure) -> dict[int, float]:
    """The usable numbers of a row, on the measure's scale."""
    values = {run["seed"]: value_of(run, measure) for run in row["runs"]}
    return {seed: value for seed, value in values.items() if value is not None}


def trained_on_gpu(results: Mapping[str, Any]) -> bool:
    """Whether peaks of memory are what was allocated on a GPU; else they are of the whole process."""
    return "cuda" in results["machine"].get("device", "")


def peak_memory(row: Mapping[str, Any]) -> float | None:
    """Bytes at the peak of a run, the mean over those that came to their end."""
    peaks = [
        run["peak_memory_bytes"] for run in row["runs"] if run["status"] == "done" and run.get("peak_memory_bytes")
    ]
    return sum(peaks) / len(peaks) if peaks else None
