"""Checkpoints of a run: each appears whole or not at all, and is verified before it is read.

`checkpoint-<step>` holds the model as transformers saves it, and beside it

    optimizer.pt, scheduler.pt, rng_state*.pth   of torch's optimiser, schedule and random numbers
    trainer_state.json                           of transformers' Trainer: step, epoch, tokens seen, lowest loss
    progress.json                                of MoxETrainer: place in the data, sums for the next metrics line
    metrics.jsonl, recipe.yaml                   of the run, as they were at that step
    manifest.json                                size and SHA-256 of all of these

A checkpoint is written as `.checkpoint-<step>.unfinished`, handed to the disk and renamed. To be removed it is renamed
first, so that no folder called `checkpoint-<step>` is ever partial, wherever the process is killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moxe.files import UNFINISHED, sync
from moxe.manifest import DamagedError, verify_manifest, write_manifest

TRAINER_STATE, PROGRESS, METRICS, RECIPE = "trainer_state.json", "progress.json", "metrics.jsonl", "recipe.yaml"
WEIGHTS = "model.safetensors"
# In the folder of a run alone: written when it is finished, and held while a process trains.
EVALUATION, LOCK = "evaluation.json", ".lock"
_REQUIRED = ("config.json", WEIGHTS, "optimizer.pt", "scheduler.pt", TRAINER_STATE, PROGRESS, METRICS, RECIPE)
_REMOVED = ".removed"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints in the folder of a run."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def all(self) -> list[Checkpoint]:
        """What is called a checkpoint, verified or not, the latest step first."""
        found = []
        for path in self.run.glob("checkpoint-*"):
            if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
                found.append(Checkpoint(path, int(match[1])))
        return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)

    def newest(self) -> tuple[Checkpoint | None, list[DamagedError]]:
        """The latest checkpoint that is as it was written, and why each later one is not.

        Raises:
            DamagedError: if there are checkpoints, but none is undamaged.
        """
        damage: list[DamagedError] = []
        for checkpoint in self.all():
            try:
                verify(checkpoint)
            except DamagedError as error:
                damage.append(error)
            else:
                return checkpoint, damage
        if damage:
            raise DamagedError(
                f"no checkpoint of {self.run} is undamaged ({damage[0]}): remove the folder to begin again, or give "
                "another --name"
            )
        return None, []

    def how_to_go_on(self) -> str:
        """What the same command will do next time, for the end of a sentence."""
        saved = self.all()
        return f"the same command goes on from {saved[0].path}" if saved else "the same command starts again"

    def set_aside(self, later_than: Checkpoint) -> None:
        """Rename damaged checkpoints, those later than the one to go on from, to `damaged-checkpoint-<step>`."""
        for checkpoint in self.all():
            if checkpoint.step > later_than.step:
                aside = self.run / f"damaged-{checkpoint.path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(checkpoint.path, aside)

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed left half-written or half-removed."""
        for pattern in (f".*{UNFINISHED}", f".*{_REMOVED}"):
            for path in self.run.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def unfinished(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is whole."""
        return self.run / f".checkpoint-{step}{UNFINISHED}"

    def finish(self, step: int) -> None:
        """Vouch for the files in `unfinished(step)` and give the folder its name."""
        unfinished, final = self.unfinished(step), self.run / f"checkpoint-{step}"
        write_manifest(unfinished)
        os.replace(unfinished, final)
        sync(self.run)

    def discard_unfinished(self, step: int) -> None:
        """Remove what was written of the checkpoint of a step."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def prune(self, keep_last: int, best_step: int | None) -> None:
        """Remove all but the last ones and the one of `best_step`."""
        for checkpoint in self.all()[keep_last:]:
            if checkpoint.step != best_step:
                removed = self.run / f".{checkpoint.path.name}{_REMOVED}"
                shutil.rmtree(removed, ignore_errors=True)
                os.replace(checkpoint.path, removed)
                shutil.rmtree(removed, ignore_errors=True)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: naming the file that is missing or differs.
    """
    path = checkpoint.path
    if not verify_manifest(path, required=_REQUIRED):
        raise DamagedError(f"{path} has no manifest.json")
    step = read_json(path / TRAINER_STATE).get("global_step")
    if step != checkpoint.step:
        raise DamagedError(f"{path} holds step {step!r}")


def read_json(path: Path) -> dict:
    """The JSON object in a file of a checkpoint.

    Raises:
        DamagedError: if it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds no JSON object")
    return content


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or it was damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
