"""A run seen through its metrics.jsonl while it is written: what was appended, and what it comes to.

Legend: L layers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moxe.errors import UserError
from moxe.observability.metrics import LARGEST_INTEGER, RoutingStatistics, check_line, is_number, parse_line
from moxe.observability.routing_watch import RoutingWatch

# The lines that a change is taken over.
CHANGE_LINES = 10

Settings = Mapping[str, Mapping[str, Any]]


@dataclass
class RunState:
    """What is known of a run after the lines read so far.

    Args:
        name: what a person calls the run.
        settings: those of its recipe by section; those that are missing are not known.
        recent: the last training lines, the latest at the end.
        first_step: of the first training line; 0 before it.
        curves: each term of the loss over all training lines; a NaN where a line lacks it.
        layers: the routing of the last training line, L objects.
        validation: the last validation line; None before the first.
        warnings: what the routing watch has said, each with its step.
    """

    name: str
    settings: Settings
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=CHANGE_LINES + 1))
    first_step: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)
    layers: list[RoutingStatistics] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    routing_watch: RoutingWatch = field(init=False)
    _lines: int = field(init=False, default=0)  # of training

    def __post_init__(self) -> None:
        self.routing_watch = RoutingWatch(self.settings.get("model", {}))

    def add(self, record: dict[str, Any], where: str) -> list[str]:
        """Take in a line, and return the warnings that it gives rise to.

        Raises:
            UserError: for a line that no training wrote, naming `where` it stands.
        """
        layers = check_line(record, where)
        if is_validation(record):
            self.validation = record
            return []
        self.recent.append(record)
        self.first_step = self.first_step or record["step"]
        self._lines += 1
        for term in loss_terms(record):
            curve = self.curves.setdefault(term, [])
            curve += [math.nan] * (self._lines - 1 - len(curve))
            curve.append(float(record[term]))
        if not layers:  # a model without routers, or the line of a step that ended the run
            return []
        self.layers = layers
        said = [f"step {record['step']}: {sentence}" for sentence in self.routing_watch.read(record["step"], layers)]
        self.warnings += said
        return said

    @property
    def step(self) -> int:
        """The step of the last training line; 0 before the first."""
        return self.recent[-1]["step"] if self.recent else 0

    @property
    def max_steps(self) -> int | None:
        """The steps of the whole run, where the settings or the place in the epoch tell."""
        training = self.settings.get("training", {})
        steps, epochs = training.get("max_steps"), training.get("num_epochs")
        if is_number(steps) and isinstance(steps, int) and steps > 0:
            return steps
        epoch = self.recent[-1].get("epoch") if self.recent else None
        if not epoch or not is_number(epochs) or not self.step / epoch < math.inf:
            return None
        # An epoch's last step may have fewer batches than the others, so this is below the whole number of its steps.
        max_steps = epochs * max(1, math.ceil(self.step / epoch - 1e-6))
        return math.ceil(max_steps) if 0 < max_steps <= LARGEST_INTEGER else None

    @property
    def seconds_left(self) -> float | None:
        """Of training alone, at the speed of the last line; None where that is not known."""
        last = self.recent[-1] if self.recent else {}
        speed, tokens, max_steps = last.get("tokens_per_second"), last.get("tokens"), self.max_steps
        if not speed or not tokens or max_steps is None:
            return None
        return (max_steps - self.step) * (tokens / self.step) / speed

    def change(self, key: str) -> float | None:
        """By how much a number has changed over the last `CHANGE_LINES` training lines, or as many as there are."""
        values = [record[key] for record in self.recent if key in record]
        return values[-1] - values[0] if len(values) > 1 else None


class MetricsFollower:
    """Reads what is appended to a metrics.jsonl, and notices when a run that goes on has put another in its place."""

    def __init__(self, path: Path, begin: Callable[[], RunState]) -> None:
        """Follow a file that may not be there yet.

        Args:
            begin: makes the state of a run of which nothing was read.
        """
        self.path = path
        self.state = begin()
        self._begin = begin
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = self._lines = 0
        self._seen: set[str | int] = set()  # sentences, and hashes of lines

    def read(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Take in what is new: each line with the warnings it gives rise to.

        After the file was replaced the state begins anew, but what was returned before is not returned again. A last
        line that is still being written waits for the next call.

        Raises:
            UserError: for a line that no training wrote, naming it.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        new = []
        with file:
            self._notice_replacement(file.fileno())
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._lines += 1
                record, warnings = self._take(line)
                if hash(line) not in self._seen:
                    new.append((record, [sentence for sentence in warnings if sentence not in self._seen]))
                self._seen.update([hash(line), *warnings])
        return new

    def _notice_replacement(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        file = (status.st_dev, status.st_ino)
        if file != self._file or status.st_size < self._offset:
            self.state, self._file, self._offset, self._lines = self._begin(), file, 0, 0

    def _take(self, line: bytes) -> tuple[dict[str, Any], list[str]]:
        where = f"line {self._lines} of {self.path}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is no valid UTF-8: {error}") from None
        record = parse_line(text, where)
        return record, self.state.add(record, where)


def is_validation(record: Mapping[str, Any]) -> bool:
    """Whether a line is that of a validation, and not of training."""
    return any(name.startswith("validation_") for name in record)


def loss_terms(record: Mapping[str, Any]) -> list[str]:
    """The names of the terms of the loss in a training line, the whole loss first."""
    return [
        name for name in record if name == "loss" or (name.endswith("_loss") and not name.startswith("validation_"))
    ]
