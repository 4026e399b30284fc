"""The runs behind a table: their recipes, the folder of each, and which of them are done.

A run is keyed by all that decides its numbers: the settings that are not at their default, the contents of the data,
and what is evaluated. The key is part of its folder's name, so a run that is done is found again, and one with another
setting is another run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moxe.experiments.scales import Scale
from moxe.experiments.tables import Row, rows_of
from moxe.recipe import Recipe
from moxe.training.run_folder import MAY_CHANGE, read_json_object

# Raised when the same settings would give other numbers than before.
FORMAT = 1
TUNING_SEED = 1000  # of the runs that choose a learning rate; no row is reported with it
RUNS, EVALUATION, VERSIONS, ERROR, LOG = "runs", "evaluation.json", "versions.json", "error.txt", "log.txt"


@dataclass(frozen=True)
class Data:
    """What every run of a grid shares.

    Args:
        fingerprint: of the training and validation tokens and the tokenizer.
        vocab_size: of the tokenizer.
        lambada: the texts whose last words are scored; None: LAMBADA is not at hand.
        lambada_source: where they come from.
    """

    fingerprint: str
    vocab_size: int
    lambada: tuple[str, ...] | None
    lambada_source: str | None

    @cached_property
    def decides(self) -> list[str | None]:
        texts = None if self.lambada is None else hashlib.sha256("\0".join(self.lambada).encode()).hexdigest()
        return [self.fingerprint, texts]


@dataclass(frozen=True)
class Run:
    """One training with its evaluation: a row of a table, or a candidate for a model's learning rate."""

    row: Row
    seed: int
    is_tuning: bool
    recipe: Recipe  # its name and output_dir are those of the run's folder

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def label(self) -> str:
        which = f"learning rate {self.recipe.training.learning_rate:g}" if self.is_tuning else f"seed {self.seed}"
        return f"{self.row.label}, {which}"

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What the finished run wrote; None: it is not finished."""
        return read_json_object(self.folder / EVALUATION)

    @property
    def error(self) -> str | None:
        """Why the last try failed."""
        path = self.folder / ERROR
        return path.read_text(encoding="utf-8").strip() if path.exists() else None


class Grid:
    """All runs of some rows of a table.

    Args:
        scale: data, length and sizes.
        seeds: 0 to `seeds` - 1 are run.
        overrides: the user's settings of `data` and `training`, as on a command line.
        out: the folder of the results.
    """

    def __init__(self, scale: Scale, seeds: int, overrides: Sequence[tuple[str, str]], data: Data, out: Path) -> None:
        self.scale, self.seeds, self.data, self.out = scale, seeds, data, out
        self.overrides = [pair for pair in overrides if pair[0] != "training.learning_rate"]
        given = [value for name, value in overrides if name == "training.learning_rate"]
        self.learning_rates = (float(given[-1]),) if given else scale.learning_rates
        self._runs: dict[tuple[str, int, float, bool], Run] = {}

    def example_of(self, row: Row) -> Run:
        """Some run of a row: what all of them have in common can be read off it."""
        return self._run(row, 0, self.learning_rates[0], is_tuning=False)

    def tuning_runs(self, model: str) -> list[Run]:
        """One run of a model for each learning rate it may choose; none if there is nothing to choose."""
        if len(self.learning_rates) == 1:
            return []
        row = next(row for row in rows_of("table1") if row.model == model)
        return [self._run(row, TUNING_SEED, rate, is_tuning=True) for rate in self.learning_rates]

    def learning_rate(self, model: str) -> float | None:
        """The learning rate with the lowest validation loss; None while runs that decide it are missing."""
        runs = self.tuning_runs(model)
        if not runs:
            return self.learning_rates[0]
        losses = []
        for run in runs:
            if run.evaluation is None and run.error is None:
                return None
            loss = math.nan if run.evaluation is None else run.evaluation["validation"]["loss"]
            if math.isfinite(loss):
                losses.append((loss, run.recipe.training.learning_rate))
        return min(losses)[1] if losses else self.learning_rates[0]

    def seed_runs(self, row: Row, learning_rate: float) -> list[Run]:
        """The runs of a row, one a seed."""
        return [self._run(row, seed, learning_rate, is_tuning=False) for seed in range(self.seeds)]

    def _run(self, row: Row, seed: int, learning_rate: float, *, is_tuning: bool) -> Run:
        """Made once: whoever watches a grid asks for all of its runs every second."""
        which = (row.name, seed, learning_rate, is_tuning)
        if which not in self._runs:
            self._runs[which] = self._make_run(row, seed, learning_rate, is_tuning)
        return self._runs[which]

    def _make_run(self, row: Row, seed: int, learning_rate: float, is_tuning: bool) -> Run:
        model = {**self.scale.models[row.model], **row.settings}
        training = {"seed": seed, "learning_rate": learning_rate}
        recipe = self.scale.recipe(model, training, self.overrides)
        role = f"tuning-{learning_rate:g}" if is_tuning else f"seed{seed}"
        recipe.training.output_dir = str(self.out / RUNS)
        recipe.training.name = f"{row.name}-{role}-{self._key(recipe)}"
        return Run(row, seed, is_tuning, recipe)

    def _key(self, recipe: Recipe) -> str:
        settings = dict(deciding_settings(recipe, self.data.vocab_size))
        decides = {"format": FORMAT, "data": self.data.decides, **settings}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]


def deciding_settings(recipe: Recipe, vocab_size: int) -> Iterator[tuple[str, Any]]:
    """The settings of a run that are not at their default and decide its numbers, by dotted name.

    The data are in the key by their contents, so that it does not depend on where they lie; a setting that a later
    version adds changes no key.
    """
    defaults = {
        "model": {field.name: field.default for field in dataclasses.fields(recipe.model_config(vocab_size))},
        "training": {field.name: field.default for field in dataclasses.fields(recipe.training)},
    }
    sections = recipe.to_dict()
    for section, of_section in defaults.items():
        for key, value in sections[section].items():
            if key not in MAY_CHANGE[section] and (key not in of_section or value != of_section[key]):
                yield f"{section}.{key}", value
    yield "data.sequence_length", recipe.data.sequence_length
