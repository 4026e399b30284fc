"""`moxe watch`: follows a run while a process trains in it, says how it stands at the end, and gets out of the way."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from moxe.cli import main
from moxe.errors import UserError
from moxe.recipe import Recipe
from moxe.training import watch
from moxe.training.run_folder import RunFolder
from moxe.training.watch import is_trained, watch_run
from tests.training.runs import ALL_STEPS, Finished, tiny_recipe

# What the installed `moxe` script runs.
PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'moxe'; from moxe.cli import main; sys.exit(main())"]
ROOT = Path(__file__).parent.parent.parent
LINE = json.dumps({"step": 1, "loss": 5.5, "layers": []}) + "\n"


@pytest.fixture
def stopped(copied: Path) -> Path:
    """A run that was stopped after its last step, before it was evaluated."""
    (copied / "evaluation.json").unlink()
    return copied


def printed(capsys: pytest.CaptureFixture[str], run: Path, wait: Callable[[], object] | None = None) -> list[str]:
    watch_run(run, Console(), wait or pytest.fail)
    return capsys.readouterr().out.splitlines()


def test_a_finished_run_is_shown_from_its_beginning_and_said_to_be_finished(
    capsys: pytest.CaptureFixture[str], finished: Finished
):
    path = finished.result.path
    *lines, last = printed(capsys, path)
    kinds = [(int(line[5]), "validation" if "  validation:  loss " in line else "training") for line in lines]
    assert kinds == ALL_STEPS
    assert all(line.startswith(f"step {step}/4  ") for line, (step, _) in zip(lines, kinds, strict=True))
    assert all("tokens/s  load " in line for line, (_, kind) in zip(lines, kinds, strict=True) if kind == "training")
    assert last == f"{path} is finished after 4 steps: evaluation.json holds its numbers"


def test_a_run_that_nobody_trains_is_shown_with_how_it_goes_on(capsys: pytest.CaptureFixture[str], stopped: Path):
    *lines, last = printed(capsys, stopped)
    assert len(lines) == len(ALL_STEPS)
    again = f"the same moxe train command goes on from {stopped / 'checkpoint-4'}"
    assert last == f"nobody is training in {stopped}, which stands at step 4 of 4: {again}"


def test_a_run_is_followed_until_its_lock_is_free(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    metrics, lock = tmp_path / "metrics.jsonl", FileLock(tmp_path / ".lock")
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 9}")

    def happen() -> Iterator[list[str]]:
        metrics.write_text("")
        yield []  # nothing logged so far
        metrics.write_text(LINE + LINE[:5])
        yield ["step 1/9  loss 5.5000"]
        metrics.write_text(LINE + LINE.replace("1", "2", 1))
        yield ["step 2/9  loss 5.5000"]
        metrics.write_text(LINE + LINE.replace("1", "2", 1) + LINE.replace("1", "3", 1))
        lock.release()  # what was written last must not be missed
        yield []

    events, seen = happen(), []

    def wait() -> None:
        seen.append(capsys.readouterr().out.splitlines())
        expected.append(next(events))

    expected: list[list[str]] = [[]]
    with lock:
        assert is_trained(tmp_path)
        end = printed(capsys, tmp_path, wait)
    assert seen == expected[:-1]
    assert len(seen) == 4
    assert end == [
        "step 3/9  loss 5.5000",
        f"nobody is training in {tmp_path}, which stands at step 3 of 9: the same moxe train command starts again",
    ]
    assert not is_trained(tmp_path)


def test_asking_whether_a_run_is_trained_leaves_it_free_and_writes_nothing(finished: Finished, tmp_path: Path):
    assert not is_trained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = finished.result.path
    for _ in range(2):
        assert not is_trained(path)
    with FileLock(path / ".lock", timeout=0):
        assert is_trained(path)


class NotMine:
    """The lock of another user, which may not be opened for writing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def acquire(self) -> None:
        raise PermissionError(13, "Permission denied")


def test_the_run_of_another_user_is_followed_until_its_lock_is_free(
    capsys: pytest.CaptureFixture[str], finished: Finished, stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    lock = FileLock(stopped / ".lock")
    monkeypatch.setattr(watch, "FileLock", NotMine)
    path = finished.result.path
    assert printed(capsys, path)[-1] == f"{path} is finished after 4 steps: evaluation.json holds its numbers"
    with lock:
        assert is_trained(stopped)
        lines = printed(capsys, stopped, lock.release)
    assert not is_trained(stopped)
    assert lines[-1].startswith(f"nobody is training in {stopped}, which stands at step 4 of 4: ")


def test_a_run_whose_lock_may_not_even_be_read_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], copied: Path):
    (copied / ".lock").unlink(missing_ok=True)
    (copied / ".lock").mkdir()  # which cannot be opened either, also by root
    assert is_trained(copied) is None
    assert printed(capsys, copied)[-1].endswith("is finished after 4 steps: evaluation.json holds its numbers")
    (copied / "evaluation.json").unlink()
    *lines, last = printed(capsys, copied)
    assert len(lines) == len(ALL_STEPS)
    nobody = f"nobody can see, since .lock may not be read, whether a process trains in {copied}"
    assert last.startswith(f"{nobody}, which stands at step 4 of 4: the same moxe train command goes on from ")
    (copied / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=f"{nobody}, and its metrics.jsonl holds nothing to show"):
        printed(capsys, copied)


def test_the_name_of_a_folder_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run, escaped = tmp_path / "a\x1b[2J", str(tmp_path / r"a\x1b[2J")
    run.mkdir()
    (run / "metrics.jsonl").write_text(LINE)
    output = io.StringIO()
    watch_run(run, Console(file=output, force_terminal=True, width=200, height=24, color_system=None), pytest.fail)
    assert capsys.readouterr().out.startswith(f"nobody is training in {escaped}, which stands at step 1")
    assert escaped in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()


def test_asking_does_not_keep_a_training_from_beginning(make_recipe: Callable[..., Recipe]):
    folder = RunFolder(make_recipe())
    folder.path.mkdir()
    asking = FileLock(folder.path / ".lock", thread_local=False)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    with folder.locked():
        assert not asking.is_locked


def test_a_terminal_gets_a_view_of_its_own_and_keeps_the_last_one(capsys: pytest.CaptureFixture[str], stopped: Path):
    output = io.StringIO()
    looks = 0

    def wait() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            lock.release()

    with (lock := FileLock(stopped / ".lock")):
        watch_run(stopped, Console(file=output, force_terminal=True, width=80, height=24, color_system=None), wait)
    on_screen, _, kept = output.getvalue().rpartition("\x1b[?1049l")
    assert on_screen.count("step 4 of 4 (100%)") == 4
    for content in (on_screen, kept):
        assert "cross-entropy" in content
        assert "layer   M0   M1 |   S2   S3 |   mean variance entropy     M" in content
    assert kept.startswith("step 4 of 4 (100%)  ")
    assert capsys.readouterr().out.startswith(f"nobody is training in {stopped}, which stands")


def test_what_was_seen_stays_on_the_terminal_after_ctrl_c(stopped: Path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    output = io.StringIO()
    with FileLock(stopped / ".lock"), pytest.raises(KeyboardInterrupt):
        watch_run(stopped, Console(file=output, force_terminal=True, width=80, height=24), interrupt)
    assert "router z-loss" in output.getvalue().rpartition("\x1b[?1049l")[2]


def test_what_cannot_be_watched_is_one_sentence(capsys: pytest.CaptureFixture[str], stopped: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "metrics.jsonl").write_text("{}\n")
    for name, sentence in [
        (
            "missing",
            "there is no run folder '{}': give the one that moxe train writes, such as runs/default; "
            "a training "
            "that has just begun makes it when its data is prepared",
        ),
        (
            "file",
            "there is no run folder '{}': give the one that moxe train writes, such as runs/default; "
            "a training "
            "that has just begun makes it when its data is prepared",
        ),
        ("empty", "nobody is training in {}, and its metrics.jsonl holds nothing to show: start moxe train first"),
        ("spoilt", "line 1 of {}/metrics.jsonl has no step, so no training wrote it"),
    ]:
        assert main(["watch", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == f"moxe: {sentence.format(tmp_path / name)}\n"
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write("spoilt\n")
    with pytest.raises(UserError, match=r"line 7 of .* is no JSON object"):
        watch_run(stopped, Console(file=io.StringIO()), pytest.fail)


@pytest.mark.parametrize("recipe", [None, "training: [1]", "[", "- 1", "training: {max_steps: many}"])
def test_without_a_recipe_that_can_be_read_less_is_known(
    capsys: pytest.CaptureFixture[str], stopped: Path, recipe: str
):
    (stopped / "recipe.yaml").unlink()
    if recipe is not None:
        (stopped / "recipe.yaml").write_text(recipe)
    lines = printed(capsys, stopped)
    assert lines[0].startswith("step 1  loss ")
    assert "stands at step 4: the same" in lines[-1]


# In processes of their own


def test_a_real_training_is_followed_to_its_end(text_file: Path, tmp_path: Path):
    recipe = tiny_recipe(text_file, tmp_path, max_steps=30, eval_steps=10, save_steps=0)
    recipe.save(tmp_path / "tiny.yaml")
    train = [*PROGRAM, "train", str(tmp_path / "tiny.yaml"), "--name", "watched"]
    folder = tmp_path / "watched"
    with subprocess.Popen(train, cwd=ROOT, stdout=subprocess.DEVNULL) as training:
        while not (folder / ".lock").exists():
            assert training.poll() is None
            time.sleep(0.05)
        with subprocess.Popen([*PROGRAM, "watch", folder], cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines = [watching.stdout.readline()]
            assert training.poll() is None  # it does not wait for the end
            lines += watching.stdout
    assert (training.returncode, watching.returncode) == (0, 0)
    steps = [line.split("/")[0] for line in lines if "validation" not in line]
    assert steps[:-1] == [f"step {step}" for step in range(1, 31)]
    assert lines[-1] == f"{folder} is finished after 30 steps: evaluation.json holds its numbers\n"
    assert len([line for line in lines if "validation:" in line]) == 3


def test_a_reader_that_has_seen_enough_and_ctrl_c_end_it(stopped: Path):
    with FileLock(stopped / ".lock"):
        (stopped / "metrics.jsonl").write_text(LINE)
        reader = subprocess.Popen(
            [*PROGRAM, "watch", stopped], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        interrupted = subprocess.Popen(
            [*PROGRAM, "watch", stopped], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for watching in (reader, interrupted):
            assert watching.stdout is not None
            assert watching.stdout.readline() == b"step 1/4  loss 5.5000\n"
        interrupted.send_signal(signal.SIGINT)
        error = b"\nmoxe: stopped by SIGINT; the training is left alone\n"
        assert interrupted.communicate(timeout=60) == (b"", error)
        assert interrupted.returncode == 130
        assert reader.stdout is not None
        assert reader.stderr is not None
        reader.stdout.close()
        with (stopped / "metrics.jsonl").open("a") as file:
            file.write(LINE)
            file.write(LINE.replace("1", "2", 1))
        assert reader.wait(timeout=60) == 0
        assert reader.stderr.read() == b""
        reader.stderr.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_terminal_as_it_was_with_the_last_view(stopped: Path, signum: signal.Signals):
    ours, theirs = pty.openpty()
    command, environment = [*PROGRAM, "watch", stopped], {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    output = b""
    with (
        FileLock(stopped / ".lock"),
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.PIPE) as watching,
    ):
        os.close(theirs)
        while b"router z-loss" not in output:
            output += os.read(ours, 10_000)
        watching.send_signal(signum)
        with suppress(OSError):  # the other end was closed
            while more := os.read(ours, 10_000):
                output += more
        assert watching.stderr is not None
        assert watching.stderr.read().decode() == f"\nmoxe: stopped by {signum.name}; the training is left alone\n"
    os.close(ours)
    assert watching.returncode == 128 + signum
    before, _, after = output.partition(b"\x1b[?1049l")
    assert b"\x1b[?1049h" in before
    assert b"\x1b[?1049h" not in after
    assert b"router z-loss" in after


def test_it_does_not_wait_for_torch(finished: Finished):
    check = (
        "import sys; sys.argv[0] = 'moxe'; from moxe.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", check, "watch", finished.result.path]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "step 4/4" in done.stdout
