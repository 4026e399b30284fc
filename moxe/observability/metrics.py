"""metrics.jsonl: one JSON object a line, a training line every `logging_steps` and a line for every validation.

Training line: step, epoch, tokens (read so far), learning_rate, loss and its terms (means over the steps since the
last line, or since the run was resumed), gradient_norm (before clipping, of the last step), tokens_per_second, layers
(one object of RoutingStatistics a layer). Validation line: step, epoch, tokens, validation_loss and the terms as
validation_lm_loss and so on (means over the held-out tokens), validation_tokens, validation_layers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# The loss (equation 21) and its terms, by their names in the model's output.
LOSS_TERMS = ("loss", "lm_loss", "difficulty_loss", "group_loss", "z_loss", "load_balancing_loss")


class MetricsFile:
    """Appends to metrics.jsonl; a number that is not finite is written as NaN or Infinity, never left out."""

    def __init__(self, path: Path, last_step: int = 0) -> None:
        """Open `path` behind the lines up to `last_step`: later ones belong to steps that are about to be repeated.

        A new run has last_step 0 and starts an empty file.
        """
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(_line(record) for record in kept if last_step), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off while it was being written is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
