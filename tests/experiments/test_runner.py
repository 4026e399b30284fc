"""A grid that is run: nothing twice, a failure alone, a stop that goes on. The runs here only pretend to train."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from moxe.errors import Stopped
from moxe.experiments.grid import Run
from moxe.experiments.runner import Runner
from moxe.experiments.tables import rows_of

ROWS = rows_of("table2")[:3]


def finish(run: Run, lambada: tuple[str, ...] | None) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "starts.txt").open("a") as file:
        file.write("started\n")
    rate = run.recipe.training.learning_rate
    (run.folder / "evaluation.json").write_text(json.dumps({"validation": {"loss": 4 + abs(rate - 3e-3)}}))


def fail_one(run: Run, lambada: tuple[str, ...] | None) -> None:
    if run.row == ROWS[1] and run.seed == 1:
        run.folder.mkdir(parents=True)
        (run.folder / "error.txt").write_text("the disk is full\n")
        raise SystemExit(1)
    finish(run, lambada)


def die_once(run: Run, lambada: tuple[str, ...] | None) -> None:
    if run.seed == 0 and not run.is_tuning and not run.folder.exists():
        run.folder.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)
    finish(run, lambada)


def wait_for_a_signal(run: Run, lambada: tuple[str, ...] | None) -> None:
    run.folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: (run.folder / "saved").touch() or os._exit(143))
    (run.folder / "ready").touch()
    time.sleep(60)


@pytest.fixture
def make_runner(make_grid):
    def make(work=finish, scale: str = "tiny", jobs: int = 2, seeds: int = 2) -> Runner:
        console = Console(file=io.StringIO(), width=200)
        return Runner(make_grid(scale=scale, seeds=seeds), ROWS, jobs, console, work)

    return make


def printed(runner: Runner) -> str:
    return runner.console.file.getvalue()


def test_every_run_is_made_once_and_not_again_by_the_same_command(make_runner, tmp_path):
    assert len(make_runner().run().done) == len(ROWS) * 2
    assert make_runner().run().done == []
    starts = list(tmp_path.glob("runs/*/starts.txt"))
    assert len(starts) == len(ROWS) * 2
    assert all(path.read_text() == "started\n" for path in starts)


def test_more_seeds_add_runs_to_those_that_are_there(make_runner):
    make_runner(seeds=1).run()
    assert {run.seed for run in make_runner(seeds=3).run().done} == {1, 2}


def test_a_failed_run_is_reported_stops_no_other_and_is_tried_again_by_the_next_command(make_runner):
    runner = make_runner(fail_one)
    finished = runner.run()
    assert len(finished.done) == len(ROWS) * 2 - 1
    assert [run.error for run in finished.failed] == ["the disk is full"]
    assert "FAILED: the disk is full" in printed(runner)
    again = make_runner().run()
    assert len(again.done) == 1
    assert again.failed == []


def test_a_run_whose_process_dies_is_a_failed_run(make_runner):
    runner = make_runner(die_once)
    finished = runner.run()
    assert len(finished.failed) == len(ROWS)
    assert f"exit code {-signal.SIGKILL}" in printed(runner)
    assert len(make_runner(die_once).run().done) == len(ROWS)


def test_the_runs_of_a_row_wait_for_its_learning_rate(make_runner):
    runner = make_runner(scale="small", seeds=1)
    done = runner.run().done
    candidates = len(runner.grid.learning_rates)
    assert [run.is_tuning for run in done[:candidates]] == [True] * candidates
    assert {run.recipe.training.learning_rate for run in done[candidates:]} == {3e-3}
    assert len(done) == runner.num_runs() == candidates + len(ROWS)


def test_a_signal_lets_the_runs_in_progress_save_and_says_which(make_runner, tmp_path: Path):
    runner = make_runner(wait_for_a_signal)

    def interrupt() -> None:
        while len(list(tmp_path.glob("runs/*/ready"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped) as stopped:
        runner.run()
    assert stopped.value.signum == signal.SIGTERM
    assert len(list(tmp_path.glob("runs/*/saved"))) == 2
    assert list(tmp_path.glob("runs/*/error.txt")) == []


def test_the_time_left_is_told(make_runner):
    runner = make_runner(jobs=1)
    runner.run()
    assert "left]" in printed(runner)
