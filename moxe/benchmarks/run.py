"""From questions to tables, `results.json` and pictures; each question is measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moxe.benchmarks import QUESTIONS
from moxe.benchmarks.machine import describe_machine
from moxe.benchmarks.plots import draw_report
from moxe.benchmarks.report import Report, merged
from moxe.benchmarks.training import SETTINGS
from moxe.errors import UserError

REPEATS, QUICK_REPEATS = 9, 3
RESULTS = "results.json"
_WIDTH_OF_A_FILE = 150  # characters of a table that does not go to a terminal


def run_benchmarks(
    questions: Sequence[str],
    out: Path,
    *,
    repeats: int | None = None,
    quick: bool = False,
    threads: int | None = None,
    compile_peers: bool = False,
    console: Console | None = None,
) -> bool:
    """Measures, prints a table a question and keeps all figures in `out`/results.json after each of them.

    Args:
        questions: names from `moxe.benchmarks.QUESTIONS`; none for all.
        out: folder for results.json and the pictures; made if need be.
        repeats: timed calls of each side; by default `REPEATS`, or `QUICK_REPEATS` if quick.
        quick: tiny sizes, to see that everything runs.
        threads: threads of every process; by default as many as torch takes.
        compile_peers: lets the transformers peers try torch.compile too.
        console: where the tables go.

    Returns:
        Whether every question was answered; one whose check failed has no figures.

    Raises:
        UserError: for an unknown question, or an `out` that holds results or cannot be made.
    """
    for question in questions:
        if question not in QUESTIONS:
            raise UserError(f"there is no question {question!r}: there are {', '.join(QUESTIONS)}")
    _make_folder(out)
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    rounds = repeats or (QUICK_REPEATS if quick else REPEATS)
    # Before anything is timed: a backend that is compiled on first use is compiled here.
    circumstances = {"quick": quick, "repeats": rounds, "machine": describe_machine(threads)}
    reports: list[Report] = []
    for question in dict.fromkeys(questions or QUESTIONS):
        parts = []
        for setting in SETTINGS if question == "training" else (None,):
            name = f"{question}, {setting}" if setting else question
            with console.status(f"measuring {name}"):
                parts.append(_ask(question, setting, rounds, quick, threads, compile_peers))
        reports.append(merged(parts))
        _print(console, reports[-1])
        _write(out / RESULTS, reports, circumstances)
        if picture := draw_report(reports[-1], out):
            console.print(f"drawn in {picture}")
    console.print(f"\nAll figures with their samples: {out / RESULTS}")
    return not any(report.failed for report in reports)


def _make_folder(out: Path) -> None:
    if (out / RESULTS).exists():
        raise UserError(f"{out} already holds {RESULTS}: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {str(out)!r} cannot be made: {error.strerror}") from None


def _ask(
    question: str, setting: str | None, repeats: int, quick: bool, threads: int | None, compile_peers: bool
) -> Report:
    """Measures in a fresh process; one that dies, say for want of memory, leaves a report that says so."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if compile_peers:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes that go on beside the measurements
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        answer = Path(folder) / "report.json"
        options = ["--out", str(answer), "--repeats", str(repeats)]
        options += ["--setting", setting] if setting else []
        options += ["--threads", str(threads)] if threads else []
        options += ["--quick"] if quick else []
        options += ["--compile"] if compile_peers else []
        command = [sys.executable, "-m", "moxe.benchmarks.worker", question, *options]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        if done.returncode == 0:
            return Report.from_dict(json.loads(answer.read_text(encoding="utf-8")))
        errors.seek(0)
        said = errors.read()
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    return Report(question, QUESTIONS[question], failed=f"its process ended with code {done.returncode}: {last}")


def _print(console: Console, report: Report) -> None:
    console.print()
    if report.rows:
        table = Table(*report.columns, title=report.title, title_justify="left")
        for row in report.rows:
            table.add_row(*row)
        console.print(table)
    if report.check:
        console.print(f"checked: {report.check}", highlight=False)
    for note in report.notes:
        console.print(note, highlight=False, markup=False)
    if report.failed:
        console.print(f"{report.question} failed: {report.failed}", highlight=False, markup=False)


def _write(path: Path, reports: Sequence[Report], circumstances: dict[str, Any]) -> None:
    answers = {report.question: report.to_dict() for report in reports}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**circumstances, "questions": answers}, indent=1), encoding="utf-8")
    os.replace(unfinished, path)
