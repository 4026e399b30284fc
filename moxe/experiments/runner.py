"""Carries out the runs of a grid: several at a time, stoppable, and none twice."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moxe.experiments.grid import ERROR, LOG, Grid, Run
from moxe.experiments.tables import Row
from moxe.experiments.worker import work
from moxe.files import write_whole
from moxe.observability.metrics import read_metrics
from moxe.training.checkpoint import METRICS
from moxe.training.signals import StopSignals, stop_signals

Work = Callable[[Run, tuple[str, ...] | None], None]

_LOOK_EVERY = 1.0  # seconds between two looks at signals and progress


@dataclass
class Finished:
    """How the runs of one command ended."""

    done: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)


@dataclass
class _Running:
    run: Run
    process: ForkServerProcess
    start: float


class Runner:
    """Works through a grid.

    Args:
        grid: where the runs lie and what they are.
        rows: those of the table.
        jobs: runs at a time.
        console: says what goes on.
        work: carries out one run in a process of its own, given the run and the texts of LAMBADA.
    """

    def __init__(self, grid: Grid, rows: Sequence[Row], jobs: int, console: Console, work: Work = work) -> None:
        self.grid, self.rows, self.jobs, self.console = grid, rows, jobs, console
        self._work_of_a_run = work
        self.finished = Finished()
        self._running: list[_Running] = []
        self._seconds: dict[str, list[float]] = {}  # that runs of each row took
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["moxe.experiments.worker"])

    def run(self) -> Finished:
        """Carry out all runs that are not done.

        Raises:
            Stopped: when a signal asked for the end; the runs in progress have saved where they are.
        """
        for run in self.all_runs():
            (run.folder / ERROR).unlink(missing_ok=True)  # what failed before is tried again
        with stop_signals() as signals, signals.deferred(), self._progress() as progress:
            self._work(signals, progress)
        return self.finished

    def _work(self, signals: StopSignals, progress: Progress) -> None:
        bar = progress.add_task("", total=None, left="", now="")
        while signals.received is None:
            waiting = self._waiting()
            if not waiting and not self._running:
                break
            for run in waiting[: self.jobs - len(self._running)]:
                self._start(run)
            wait([running.process.sentinel for running in self._running], timeout=_LOOK_EVERY)
            self._collect()
            progress.update(bar, **self._state())
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.join()

    def all_runs(self) -> list[Run]:
        """Every run that is known so far: those of a row come to be known with its model's learning rate.

        Seed by seed, so that a grid that is stopped early has something of every row.
        """
        models = dict.fromkeys(row.tuned_as for row in self.rows)
        tuning = [run for model in models for run in self.grid.tuning_runs(model)]
        rates = {model: self.grid.learning_rate(model) for model in models}
        of_rows = [self.grid.seed_runs(row, rate) for row in self.rows if (rate := rates[row.tuned_as]) is not None]
        return tuning + [runs[seed] for seed in range(self.grid.seeds) for runs in of_rows]

    def num_runs(self) -> int:
        """How many runs there will be in all."""
        models = {row.tuned_as for row in self.rows}
        return len(self.rows) * self.grid.seeds + sum(len(self.grid.tuning_runs(model)) for model in models)

    def _waiting(self) -> list[Run]:
        started = {running.run.folder for running in self._running}
        return [
            run for run in self.all_runs() if run.folder not in started and run.error is None and run.evaluation is None
        ]

    def _start(self, run: Run) -> None:
        process = self._context.Process(
            target=self._work_of_a_run, args=(run, None if run.is_tuning else self.grid.data.lambada)
        )
        process.start()
        self._running.append(_Running(run, process, time.monotonic()))

    def _collect(self) -> None:
        for running in [running for running in self._running if not running.process.is_alive()]:
            self._running.remove(running)
            run, seconds = running.run, time.monotonic() - running.start
            if run.evaluation is not None:
                self.finished.done.append(run)
                self._seconds.setdefault(run.row.name, []).append(seconds)
                self._say(f"{run.label}: {run.evaluation['validation']['loss']:.4f} nats a token, {seconds:.0f} s")
                continue
            if run.error is None:  # killed, most likely for want of memory
                write_whole(run.folder / ERROR, f"the process ended with exit code {running.process.exitcode}\n")
            self.finished.failed.append(run)
            self._say(f"{run.label} FAILED: {run.error} (see {run.folder / LOG})")

    def _state(self) -> dict[str, Any]:
        runs = self.all_runs()
        return {
            "completed": sum(run.evaluation is not None or run.error is not None for run in runs),
            "total": self.num_runs(),
            "now": ", ".join(f"{running.run.label} {self._share_done(running):.0%}" for running in self._running),
            "left": self._time_left(runs),
        }

    def _share_done(self, running: _Running) -> float:
        """Of the steps of a run in progress, by the last line of its metrics."""
        lines = read_metrics(path) if (path := running.run.folder / METRICS).exists() else []
        steps = running.run.recipe.training.max_steps
        return lines[-1]["step"] / steps if lines and steps > 0 else 0.0

    def _time_left(self, runs: Sequence[Run]) -> str:
        """From what runs of the same row took, or of any row while there is none."""
        of_all = [seconds for of_row in self._seconds.values() for seconds in of_row]
        if not of_all:
            return "time left unknown"
        mean = statistics.mean(of_all)

        def expected(run: Run) -> float:
            return statistics.mean(self._seconds.get(run.row.name, [mean]))

        left = sum(expected(run) for run in runs if run.evaluation is None and run.error is None)
        left += mean * (self.num_runs() - len(runs))
        left -= sum(min(time.monotonic() - running.start, expected(running.run)) for running in self._running)
        return f"about {timedelta(seconds=max(0, round(left / self.jobs)))} left"

    def _progress(self) -> Progress:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}  {task.fields[now]}"),
        )
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def _say(self, line: str) -> None:
        state = self._state()
        where = f"[{state['completed']}/{state['total']}, {state['left']}] "
        self.console.print(where + line, markup=False, highlight=False, soft_wrap=True)
