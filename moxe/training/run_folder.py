"""The folder of a run: what may be written where, and what a run that goes on finds.

Every file appears whole or not at all: it is written beside its place and then moved there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moxe
from moxe.errors import UserError, shown
from moxe.files import UNFINISHED, write_whole
from moxe.manifest import DamagedError, verify_manifest, write_manifest
from moxe.recipe import Recipe, load_recipe
from moxe.training.checkpoint import (
    EVALUATION,
    LOCK,
    METRICS,
    PROGRESS,
    RECIPE,
    WEIGHTS,
    Checkpoint,
    Checkpoints,
    read_json,
    read_json_object,
)

# Settings that a run may go on with although it was started with others: they decide what is kept, shown, how fast it
# goes, and what becomes of a step that would have ended it. `num_threads` and `backend` round differently; the others
# leave the weights as they would have been.
MAY_CHANGE = {
    "data": {"cache_dir", "num_workers"},
    "training": {
        "output_dir",
        "name",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "on_nonfinite",
        "max_skips_in_a_row",
        "report_to",
        "sample_prompt",
        "sample_tokens",
        "num_threads",
    },
    "model": {"backend"},
}
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
# What changes the rounding of a step, by its name in versions.json.
_DECIDES_BITS = ("moxe", *_PACKAGES, "cpu", "device", "threads", "backend")


class RunFolder:
    """`<output_dir>/<name>/` of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_dir
        self.checkpoints = Checkpoints(self.path)
        self.recipe_path = self.path / RECIPE
        self.metrics_path = self.path / METRICS
        self.evaluation_path = self.path / EVALUATION
        self.versions_path = self.path / "versions.json"
        self.plots_path = self.path / "plots"

    def finished_evaluation(self, recipe: Recipe) -> dict[str, Any] | None:
        """What evaluation.json holds if this run is finished, else None; writes nothing.

        Raises:
            UserError: if the folder holds a run, finished or not, that was started with other settings.
        """
        evaluation = read_json_object(self.evaluation_path) if (self.path / WEIGHTS).exists() else None
        saved = self.checkpoints.all()
        if evaluation is not None:
            self._refuse_other_run(recipe, self.recipe_path)
        elif saved:
            with suppress(DamagedError):  # which is said, and an earlier one taken, when the run goes on
                verify_manifest(saved[0].path, [RECIPE], required=[RECIPE])
                self._refuse_other_run(recipe, saved[0].path / RECIPE)
        return evaluation

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder; no other process trains in it meanwhile.

        Raises:
            UserError: if it cannot be made or written, or another process trains in it.
        """
        # Not at once: `moxe watch` holds it for a moment to see whether it is free.
        lock = FileLock(self.path / LOCK, timeout=0.5)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.path}: wait for it, or give another --name"
            ) from None
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be made or written: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()

    def checkpoint_to_go_on_from(
        self, recipe: Recipe, data_fingerprint: str, processes: int, console: Console
    ) -> Checkpoint | None:
        """The newest undamaged checkpoint; None: the run starts at step 0.

        Says which later ones are damaged and how, and sets them aside; removes what was left half-written.

        Raises:
            UserError: if no checkpoint is undamaged, or the one that is belongs to a run with other settings, data or
                processes.
        """
        newest, damage = self.checkpoints.newest()
        for error in damage:
            assert newest is not None
            warning = f"warning: {error}; going on from {newest.path.name} instead"
            console.print(warning, markup=False, highlight=False, soft_wrap=True)
        if newest is not None:
            self._refuse_other_run(recipe, newest.path / RECIPE)
            self._refuse_other_rows(newest, data_fingerprint, processes)
            self.checkpoints.set_aside(later_than=newest)
        self.checkpoints.remove_unfinished()
        return newest

    def _refuse_other_run(self, recipe: Recipe, recipe_path: Path) -> None:
        before, now = load_recipe(recipe_path).to_dict(), recipe.to_dict()
        for section, settings in now.items():
            for key in sorted(settings.keys() & before[section].keys() - MAY_CHANGE[section]):
                if before[section][key] != settings[key]:
                    raise UserError(
                        f"{self.path} holds a run that was started with {section}.{key}={before[section][key]!r}, not "
                        f"{settings[key]!r}: give another --name, or the same settings"
                    )

    def _refuse_other_rows(self, checkpoint: Checkpoint, fingerprint: str, processes: int) -> None:
        progress = read_json(checkpoint.path / PROGRESS)
        data = progress.get("data")
        before = progress.get("processes")
        if before != processes:
            raise UserError(
                f"the run in {self.path} was started with {shown(before)} processes and goes on with as many alone, "
                f"not {processes}: give another --name"
            )
        if not isinstance(data, dict) or data.get("fingerprint") != fingerprint:
            raise UserError(
                f"the data (or the tokenizer) have changed since the run in {self.path} was started: put back what was "
                "there, or give another --name"
            )

    def write_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """model.safetensors, config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
        temporary = Path(tempfile.mkdtemp(prefix=".model-", suffix=UNFINISHED, dir=self.path))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            names = [file.name for file in temporary.iterdir()]
            for name in names:
                os.replace(temporary / name, self.path / name)
            write_manifest(self.path, names)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write_versions(self, device: str, backend: str, *, goes_on: bool) -> list[str]:
        """versions.json: what the run is made with, and on what machine; for a run that goes on also what it was
        started with.

        Returns:
            What is not as it was at the start, of all that changes how a step is rounded or what it sees.
        """
        before = (read_json_object(self.versions_path) or {}) if goes_on else {}
        versions = {
            "python": platform.python_version(),
            "moxe": moxe.__version__,
            "git_commit": _git_commit(),
            **{package: _version(package) for package in _PACKAGES},
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "device": device,
            "threads": torch.get_num_threads(),
            "backend": backend,
        }
        started = before.get("started_with", before)
        started = {name: started.get(name, versions[name]) for name in _DECIDES_BITS}
        write_json(self.versions_path, {**versions, "started_with": started} if goes_on else versions)
        changed = [name for name in _DECIDES_BITS if started[name] != versions[name]]
        return [f"{name} {started[name]} is now {versions[name]}" for name in changed]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that moxe runs from; None when it is installed elsewhere."""
    root = Path(moxe.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    """The model name that Linux gives; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
