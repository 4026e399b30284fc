"""metrics.jsonl: one JSON object a line, a training line every `logging_steps` and a line for every validation.

Training line: step, epoch, tokens (read so far), learning_rate, loss and its terms (means over the steps since the
last line; skipped steps count), gradient_norm (before clipping, of the last step),
gradient_norms (the same by part of the model; the squares add up), skipped_steps (since the beginning of the run),
tokens_per_second, layers (one object of RoutingStatistics a layer; none for a model without routers). A term that the
model's loss does not have is left out. Validation line: step, epoch, tokens,
validation_loss and the terms as validation_lm_loss and so on (means over the held-out tokens), validation_tokens,
validation_layers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from moxe.errors import UserError, shown
from moxe.files import write_whole

# What a line holds beside numbers.
_NESTED = ("layers", "gradient_norms", "validation_layers")
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class RunMetrics:
    """A metrics.jsonl by kind of line.

    Args:
        training: its training lines, at least one, all of the same layers and experts.
        validation: its validation lines.
    """

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]


@dataclass(frozen=True)
class RoutingStatistics:
    """The routing of one layer over the counted tokens.

    Args:
        load: share of the token-to-expert assignments that each of the E experts received; sums to 1.
        difficulty_mean, difficulty_variance: of the difficulty d (equation 5); None without it.
        router_entropy: mean of the normalised entropy of the unbiased router (equation 10), from 0 to 1.
        mlstm_share: share of the assignments that went to group M, the first half of the experts.
    """

    load: list[float]
    difficulty_mean: float | None
    difficulty_variance: float | None
    router_entropy: float
    mlstm_share: float


class MetricsFile:
    """Appends to metrics.jsonl; a number that is not finite is written as NaN or Infinity, never left out."""

    def __init__(self, path: Path, resumed_from: Path | None = None) -> None:
        """Start the file `path`: empty, or with the lines of the copy that a checkpoint holds.

        Lines behind those of the checkpoint belong to steps that are about to be repeated.
        """
        self.path = path
        write_whole(path, b"" if resumed_from is None else resumed_from.read_bytes())

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def copy_to(self, path: Path) -> None:
        """Keep the lines written so far."""
        shutil.copyfile(self.path, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off while it was being written is left out.

    Raises:
        UserError: for a line that is no JSON object, naming it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no valid UTF-8: {error}") from None
    return [parse_line(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.endswith("\n")]


def read_run(path: str | Path) -> RunMetrics:
    """The lines of the run whose metrics.jsonl this is, also of one that goes on or was killed.

    Raises:
        UserError: if there is no such file, no training line in it, or a line that is none of a training, naming it.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no metrics file {str(path)!r} to draw")
    records = read_metrics(path)
    run = RunMetrics(
        training=[record for record in records if "layers" in record],
        validation=[record for record in records if "validation_loss" in record],
    )
    if not run.training:
        raise UserError(f"{path} holds no training line to draw")
    experts = None  # of each layer
    for number, record in enumerate(records, 1):
        where = f"line {number} of {path}"
        here = [len(layer.load) for layer in check_line(record, where)]
        if "layers" not in record:
            continue
        experts = here if experts is None else experts
        if here != experts:
            raise UserError(f"{where} holds other layers or experts than the lines before, so no one training wrote it")
    return run


def check_line(record: Mapping[str, Any], where: str) -> list[RoutingStatistics]:
    """The routing of each layer of a line that a training may have written; [] for a line without layers.

    Raises:
        UserError: for a line that no training wrote, naming `where` it stands.
    """
    if "step" not in record:
        raise UserError(f"{where} has no step, so no training wrote it")
    step = record["step"]
    if not is_number(step) or not isinstance(step, int) or step < 1:
        raise UserError(
            f"{where} holds step={shown(step)}, which is no whole number from 1 on, so no training wrote it"
        )
    norms = record.get("gradient_norms", {})
    if not isinstance(norms, dict):
        raise UserError(f"{where} holds gradient_norms={shown(norms)}, so no training wrote it")
    numbers = [(name, value) for name, value in record.items() if name not in _NESTED]
    for name, value in (*numbers, *norms.items()):
        if not name.isprintable():  # a terminal would obey it
            raise UserError(f"{where} holds a name that cannot be printed, {shown(name)}, so no training wrote it")
        if not is_number(value):
            raise UserError(f"{where} holds {name}={shown(value)}, which is no number, so no training wrote it")
    if not 0 <= record.get("epoch", 0) < math.inf:
        raise UserError(f"{where} holds epoch={shown(record['epoch'])}, so no training wrote it")
    return layers_of(record, where)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number as a training has it: a float, also NaN and Infinity, or an integer of 64 bits."""
    if isinstance(value, int):  # of which bool is a kind
        return not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    return isinstance(value, float)


def layers_of(record: Mapping[str, Any], where: str) -> list[RoutingStatistics]:
    """The routing of each layer in a training line; [] for a line without layers.

    Raises:
        UserError: for layers that no training wrote, naming `where` they stand.
    """
    written = record.get("layers", [])
    try:
        layers = [RoutingStatistics(**layer) for layer in written]
    except TypeError:
        layers = None
    if not isinstance(written, list) or layers is None or not all(map(_is_routing, layers)):
        raise UserError(f"{where} holds layers that no training wrote")
    return layers


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The object of one line.

    Raises:
        UserError: if it is none, naming `where` it stands.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object")
    return record


def _is_routing(layer: RoutingStatistics) -> bool:
    load = layer.load
    of_difficulty = [value for value in (layer.difficulty_mean, layer.difficulty_variance) if value is not None]
    are_shares = isinstance(load, list) and len(load) > 0 and len(load) % 2 == 0
    return are_shares and all(map(is_number, (*load, *of_difficulty, layer.router_entropy, layer.mlstm_share)))
