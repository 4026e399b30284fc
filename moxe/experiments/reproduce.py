"""`moxe reproduce`: from the name of a table to its report."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moxe.data.baselines import text_baselines
from moxe.data.corpus import Corpus, prepare
from moxe.data.packing import PackedStream
from moxe.data.sources import read_documents
from moxe.errors import Stopped, UserError, shown
from moxe.evaluation.last_word import LAMBADA
from moxe.experiments import SCALES, TABLES
from moxe.experiments.grid import FORMAT, Data, Grid, Run
from moxe.experiments.measures import Margins
from moxe.experiments.report import write_report
from moxe.experiments.results import collect
from moxe.experiments.runner import Finished, Runner
from moxe.experiments.scales import load_scale
from moxe.experiments.speed import SPEED, measure_speed
from moxe.experiments.statistics import add_statistics
from moxe.experiments.tables import Row, rows_of
from moxe.files import write_whole
from moxe.training.run_folder import read_json_object

_MARK = "grid.json"  # says that a folder holds results, and of which format
# What the grid decides for each run.
_OURS_TO_SET = ("training.seed", "training.name", "training.output_dir")
NO_LAMBADA = "none"


def reproduce(
    table: str,
    scale_name: str,
    *,
    out: Path | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    lambada: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    command: str = "",
    console: Console | None = None,
) -> Finished:
    """Train and evaluate every model of a table, and write results.json, Markdown tables and report.html.

    Runs that are done are not repeated, those that were stopped go on; a run that fails is reported and the others go
    on. The reports are written of all rows, of this table and others, that the folder knows.

    Args:
        table: a key of `moxe.experiments.TABLES`.
        scale_name: one of `moxe.experiments.SCALES`.
        out: folder of the results; None: results/<scale>.
        seeds: runs of each row; None: as the scale says.
        jobs: runs at a time; None: one on a GPU, else one a core.
        lambada: file of {"text": ...} rows whose last words are scored; "none": do without; None: LAMBADA from the
            hub, or without if that cannot be reached, which is said.
        overrides: settings of `data` and `training` for all runs, as on a command line.
        command: what the results say they were made with.
        console: where to say what goes on; None: the standard output.

    Raises:
        UserError: for a table, scale, number, setting or file that does not exist or fit, a folder with results of
            another version.
        Stopped: when a signal asked for the end; the same command goes on.
    """
    console = console or Console()
    _check(table, scale_name, seeds, jobs, overrides)
    scale = load_scale(scale_name)
    out = Path(os.path.expanduser(out or Path("results") / scale_name))
    had_lambada = _require_own_folder(out)
    texts, source = _lambada(lambada, scale.lambada_examples, had_lambada, console)
    recipe = scale.recipe(scale.models["moxe"], {}, overrides)
    corpus = prepare(recipe.data, seed=0)
    data = Data(corpus.fingerprint, len(corpus.tokenizer), texts, source)
    grid = Grid(scale, seeds or scale.seeds, overrides, data, out)
    _mark(out, has_lambada=texts is not None)
    rows = rows_of(table)
    runner = Runner(grid, rows, jobs or _default_jobs(), console)
    console.print(
        f"{table} at scale {scale_name}: {runner.num_runs()} runs, {runner.jobs} at a time, in {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        finished = runner.run()
    except Stopped as stopped:
        _report(grid, rows, corpus, command, console, measure=False)
        raise Stopped(stopped.signum, "the same command goes on") from None
    _report(grid, rows, corpus, command, console, measure=True)
    return finished


def _check(table: str, scale: str, seeds: int | None, jobs: int | None, overrides: Sequence[tuple[str, str]]) -> None:
    for what, name, names in (("table", table, TABLES), ("scale", scale, SCALES)):
        if name not in names:
            raise UserError(f"there is no {what} {shown(name)}: there are {', '.join(names)}")
    for what, number in (("seeds", seeds), ("jobs", jobs)):
        if number is not None and number < 1:
            raise UserError(f"{what}={number} must be at least 1")
    for name, _ in overrides:
        if name in _OURS_TO_SET or name.startswith("model."):
            raise UserError(f"{name} is set by the rows of the table: what can be overridden is data.* and training.*")


def _require_own_folder(out: Path) -> bool:
    """Refuse a folder that is not new, not empty, and holds no results of this version.

    Returns:
        Whether its runs were evaluated on LAMBADA.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    mark = read_json_object(out / _MARK)
    if mark is None or "format" not in mark:
        raise UserError(f"{out} holds something that is no results of moxe reproduce: give another --out")
    if mark["format"] != FORMAT:
        raise UserError(
            f"{out} holds results of another version of moxe (format {shown(mark['format'])}, this one writes "
            f"{FORMAT}): give another --out"
        )
    return bool(mark.get("lambada"))


def _mark(out: Path, *, has_lambada: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / _MARK, json.dumps({"format": FORMAT, "lambada": has_lambada}) + "\n")
    except OSError as error:
        raise UserError(f"the results folder {out} cannot be made or written: {error.strerror}") from None


def _lambada(
    given: str | None, limit: int | None, is_needed: bool, console: Console
) -> tuple[tuple[str, ...] | None, str | None]:
    """The texts whose last words are scored, and where they come from."""
    if given == NO_LAMBADA:
        return None, None
    reading: dict[str, Any] = {"text_field": "text", "document_separator": ""}
    if given is not None:
        return tuple(itertools.islice(read_documents(given, **reading), limit)), Path(given).name
    hub = {"subset": LAMBADA["subset"], "split": LAMBADA["split"], **reading}
    try:
        return tuple(itertools.islice(read_documents(LAMBADA["source"], **hub), limit)), LAMBADA["source"]
    except UserError as error:
        if is_needed:
            raise UserError(f"the runs of this folder were made with LAMBADA; give --lambada FILE: {error}") from None
        console.print(f"doing without LAMBADA: {error}", markup=False, highlight=False, soft_wrap=True)
        return None, None


def _default_jobs() -> int:
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def _report(grid: Grid, rows: Sequence[Row], corpus: Corpus, command: str, console: Console, *, measure: bool) -> None:
    """Write everything that the folder knows; with `measure` also time what has not been timed."""
    rows = _known_rows(grid, rows)
    finished = [done for row in rows if (done := next(iter(_finished_runs(grid, row)), None))]
    if not finished:
        return
    if measure:
        console.print("measuring the speed of each row, alone on the machine", highlight=False)
        try:
            measure_speed(finished, grid.data.vocab_size, grid.out)
        except (RuntimeError, MemoryError) as error:  # most likely out of memory, which no report should be lost for
            console.print(f"the speed is not measured: {error}", markup=False, highlight=False, soft_wrap=True)
    speed = read_json_object(grid.out / SPEED) or {}
    results = collect(grid, rows, command=command, guessing=_guessing(corpus), speed=speed)
    add_statistics(results, Margins())
    for path in write_report(results, grid.out):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _known_rows(grid: Grid, rows: Sequence[Row]) -> list[Row]:
    """The rows of this table and those of others that have a finished run in the folder."""
    every = dict.fromkeys(row for table in ("table1", "table2") for row in rows_of(table))
    return [row for row in every if row in rows or _finished_runs(grid, row)]


def _finished_runs(grid: Grid, row: Row) -> list[Run]:
    rate = grid.learning_rate(row.tuned_as)
    return [] if rate is None else [run for run in grid.seed_runs(row, rate) if run.evaluation is not None]


def _guessing(corpus: Corpus) -> dict[str, Any]:
    """What the same held-out text costs whoever guesses every token alike, or by its frequency in training."""
    train = None if isinstance(corpus.train, PackedStream) else corpus.train.documents
    baselines = text_baselines(train, corpus.validation.documents, corpus.validation_texts)
    bits_a_nat = baselines.zlib.bits_per_byte / baselines.zlib.nats_per_token
    uniform = math.log(len(corpus.tokenizer))
    guessing: dict[str, Any] = {"uniform": {"nats_per_token": uniform, "bits_per_byte": uniform * bits_a_nat}}
    if baselines.unigram is not None:
        guessing["unigram"] = asdict(baselines.unigram)
    return guessing
