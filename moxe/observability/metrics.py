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
import shutil
from pathlib import Path
from typing import Any

from moxe.errors import UserError
from moxe.files import write_whole


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
    return [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object")
    return record
