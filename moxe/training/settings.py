"""Which runs are seeds of one setting, and what each setting is called, from the recipe.yaml beside their metrics."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from moxe.errors import UserError, shown
from moxe.recipe import load_recipe
from moxe.training.checkpoint import METRICS, RECIPE
from moxe.training.run_folder import MAY_CHANGE

# Seeds of one setting differ in nothing else: in what a run may go on with, but for what decides how fast it trains,
# which may be what is compared, and over how many steps each of its lines is a mean.
_OF_A_SEED = {
    "data": MAY_CHANGE["data"],
    "training": MAY_CHANGE["training"] - {"num_threads", "logging_steps"} | {"seed"},
    "model": MAY_CHANGE["model"] - {"backend"},
}
_LONGEST_DIFFERENCE = 48  # letters, of a label made of settings


@dataclass(frozen=True)
class GivenRun:
    """A run as it is named on a command line.

    Args:
        given: the folder or metrics.jsonl, as it was written.
        metrics: its metrics.jsonl.
        label: of its setting; None: to be made of its recipe or its folder.
    """

    given: str
    metrics: Path
    label: str | None

    @property
    def name(self) -> str:
        """Of its folder; of the file, if it is not called as a run calls it."""
        path = self.metrics.resolve()
        return path.parent.name if path.name == METRICS else path.stem


@dataclass
class _Setting:
    """Runs without a label that are seeds of one setting; its values by dotted name, None where there is no recipe."""

    values: dict[str, Any] | None
    runs: list[GivenRun] = field(default_factory=list)


def find_run(text: str) -> GivenRun:
    """The run that `RUN` or `LABEL=RUN` names; RUN is a run folder or a metrics.jsonl, and either may hold a `=`.

    Raises:
        UserError: for what is neither, a folder without metrics.jsonl, and an empty label.
    """
    label, path = next(_readings(text), (None, text))
    if not os.path.exists(os.path.expanduser(path)) and "=" in text:
        label, _, path = text.partition("=")
    if label is not None and not label.strip():
        raise UserError(f"the label in {shown(text)} is empty: write LABEL=RUN, such as full=runs/default")
    folder = os.path.expanduser(path)
    metrics = os.path.join(folder, METRICS) if os.path.isdir(folder) else folder
    if not os.path.isfile(metrics):
        if os.path.isdir(folder):
            raise UserError(f"the folder {shown(path)} holds no {METRICS}: it is no run, or one that has not begun")
        raise UserError(
            f"there is no run {shown(path)}: a run folder, such as runs/default, or a {METRICS} is expected"
        )
    return GivenRun(path, Path(metrics), label and label.strip())


def _readings(text: str) -> Iterator[tuple[str | None, str]]:
    """The ways to cut LABEL=RUN such that there is such a RUN, the one without a label first."""
    cuts = [position for position, letter in enumerate(text) if letter == "="]
    for label, path in [(None, text), *((text[:cut], text[cut + 1 :]) for cut in cuts)]:
        if os.path.exists(os.path.expanduser(path)):
            yield label, path


def group_by_setting(runs: Sequence[GivenRun]) -> dict[str, list[Path]]:
    """The metrics.jsonl of the runs of each setting, by its label, in the order given.

    Runs with one label are of one setting. Of those without, runs are whose recipes differ in the seed alone, in names,
    paths and in how often they validate and save; a run without recipe.yaml is a setting of its own. Those are
    called by the settings that tell them apart if all of that is short, else by what the names of their folders have in
    common.

    Raises:
        UserError: for a run that is given twice, a recipe that cannot be read, and a label that is also the name of a
            run without one.
    """
    twice = [path for path, count in Counter(run.metrics.resolve() for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"the run {twice[0]} is given twice: give each run once")
    unlabelled = _settings_of([run for run in runs if run.label is None])
    names = _names(unlabelled, taken={run.label for run in runs if run.label is not None})
    label_of = {id(run): name for setting, name in zip(unlabelled, names, strict=True) for run in setting.runs}
    grouped: dict[str, list[Path]] = {}
    for run in runs:
        grouped.setdefault(run.label or label_of[id(run)], []).append(run.metrics)
    return grouped


def _settings_of(runs: Sequence[GivenRun]) -> list[_Setting]:
    settings: list[_Setting] = []
    for run in runs:
        values = _values(run)
        setting = next((setting for setting in settings if values is not None and setting.values == values), None)
        if setting is None:
            setting = _Setting(values)
            settings.append(setting)
        setting.runs.append(run)
    return settings


def _values(run: GivenRun) -> dict[str, Any] | None:
    """Every setting of the run's recipe that its other seeds share, by dotted name."""
    path = run.metrics.parent / RECIPE
    if run.metrics.name != METRICS or not path.is_file():
        return None
    try:
        recipe = load_recipe(path).to_dict()
    except UserError as error:
        raise UserError(f"{path}: {error}; LABEL={run.given} does without it") from None
    return {
        f"{section}.{key}": value
        for section, settings in recipe.items()
        for key, value in settings.items()
        if key not in _OF_A_SEED[section]
    }


def _names(settings: Sequence[_Setting], taken: set[str]) -> list[str]:
    """A label for each setting, none of them among those that are taken."""
    by_path = [setting.runs[0].given for setting in settings]
    for names in (_by_difference(settings), _by_folder(settings), by_path):
        if names is not None and len({*names} - taken) == len(settings):
            return names
    doubtful = next(name for name in by_path if name in taken)
    raise UserError(f"{shown(doubtful)} is the label of a run, and a run without a label: give each run a label")


def _by_difference(settings: Sequence[_Setting]) -> list[str] | None:
    """What tells the settings apart, such as group_loss_coef=0; None if that is long, or not known of all."""
    recipes = [setting.values for setting in settings if setting.values is not None]
    if len(recipes) < max(2, len(settings)):
        return None
    names = list(dict.fromkeys(name for values in recipes for name in values))
    differing = [name for name in names if any(values.get(name) != recipes[0].get(name) for values in recipes)]
    keys = Counter(name.partition(".")[2] for name in differing)
    labels = []
    for values in recipes:
        parts = [
            f"{name if keys[name.partition('.')[2]] > 1 else name.partition('.')[2]}={_written(values[name])}"
            for name in differing
            if name in values
        ]
        labels.append(", ".join(parts))
    return labels if all(0 < len(label) <= _LONGEST_DIFFERENCE for label in labels) else None


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _by_folder(settings: Sequence[_Setting]) -> list[str]:
    """By name of its folder; of several names what these have in common, without a number or a `seed` at the end."""
    names = []
    for setting in settings:
        name = setting.runs[0].name
        if len({run.name for run in setting.runs}) > 1:
            letters = zip(*(run.name for run in setting.runs), strict=False)
            common = "".join(of_runs[0] for of_runs in takewhile(lambda of_runs: len({*of_runs}) == 1, letters))
            name = re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", common) or name
        names.append(name)
    return names
