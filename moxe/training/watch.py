"""`moxe watch`: shows a run for as long as a process trains in its folder; without torch, so that it begins at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live

from moxe.errors import Stopped, UserError, printable
from moxe.observability.follow import MetricsFollower, RunState
from moxe.observability.live import plain_line, view
from moxe.training.checkpoint import EVALUATION, LOCK, METRICS, RECIPE, Checkpoints, read_json_object
from moxe.training.signals import stop_signals


def _wait() -> None:
    time.sleep(0.5)


def watch_run(run: str | Path, console: Console, wait: Callable[[], object] = _wait) -> None:
    """Show a run from its beginning and follow it until no process trains in its folder; then say how it stands.

    Where nobody can see whether one does, it is shown as it is and said so.

    Args:
        run: the folder of the run.
        console: a view that fits it if it is a terminal; otherwise a line for each line of metrics.jsonl.
        wait: called between two looks at the files.

    Raises:
        UserError: if there is no such folder, if it holds no metrics and nobody trains in it, and for a line of
            metrics.jsonl that no training wrote.
        Stopped: when SIGINT, SIGTERM or SIGHUP asked for the end; a terminal is as it was before, with the last view.
    """
    path = Path(os.path.expanduser(run))
    if path.name == METRICS and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"there is no run folder {str(run)!r}: give the one that moxe train writes, such as runs/default; a "
            "training that has just begun makes it when its data is prepared"
        )
    follower = MetricsFollower(path / METRICS, lambda: RunState(printable(str(path)), _settings(path)))
    looks = _looks(follower, path, wait)
    try:
        with stop_signals():
            if console.is_terminal and not console.is_dumb_terminal:
                _show(follower, looks, console)
            else:
                _print_lines(follower, looks)
    except Stopped as stopped:
        raise Stopped(stopped.signum, "the training is left alone") from None
    if not follower.state.recent:
        raise UserError(f"{_nobody(path)}, and its {METRICS} holds nothing to show: start moxe train first")
    print(printable(_standing(path, follower.state)), flush=True)


def is_trained(run: Path) -> bool | None:
    """Whether a process trains in this folder, this moment; None where nobody can see it: its lock may not be read."""
    if not (run / LOCK).exists():
        return False
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:  # the run of another user, or on a disk that may only be read
        return _is_held(run / LOCK)
    lock.release()
    return False


def _is_held(lock: Path) -> bool | None:
    """As `is_trained`, of a lock that may be read at most: a shared lock, which reading allows, is refused if so."""
    try:
        import fcntl  # not on Windows

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False


Look = list[tuple[dict[str, Any], list[str]]]


def _looks(follower: MetricsFollower, run: Path, wait: Callable[[], object]) -> Iterator[Look]:
    while True:
        goes_on = is_trained(run)  # before the file is read, or its last lines might be missed
        yield follower.read()
        if not goes_on:
            return
        wait()


def _show(follower: MetricsFollower, looks: Iterator[Look], console: Console) -> None:
    """On a screen of its own, so that a terminal of another size is no trouble; the last view stays behind."""
    has_blocks = not console.options.ascii_only
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for _ in looks:
                drawn = view(follower.state, console.width, console.height, has_blocks=has_blocks)
                live.update(drawn, refresh=True)
    finally:
        if follower.state.recent:
            console.print(view(follower.state, console.width, console.height - 2, has_blocks=has_blocks))


def _print_lines(follower: MetricsFollower, looks: Iterator[Look]) -> None:
    for look in looks:
        for record, warnings in look:
            print(plain_line(record, follower.state.max_steps), *warnings, sep="\n", flush=True)


def _settings(run: Path) -> dict[str, Mapping[str, Any]]:
    """The sections of the recipe in a run folder, unchecked: what cannot be read is left out."""
    try:
        content = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    sections = content.items() if isinstance(content, Mapping) else ()
    return {section: settings for section, settings in sections if isinstance(settings, Mapping)}


def _standing(run: Path, state: RunState) -> str:
    if read_json_object(run / EVALUATION) is not None:  # the last file that a run writes
        return f"{run} is finished after {state.step:,} steps: {EVALUATION} holds its numbers"
    of = "" if state.max_steps is None else f" of {state.max_steps:,}"
    saved = Checkpoints(run).all()
    again = f"goes on from {saved[0].path}" if saved else "starts again"
    return f"{_nobody(run)}, which stands at step {state.step:,}{of}: the same moxe train command {again}"


def _nobody(run: Path) -> str:
    """Why the view has ended."""
    if is_trained(run) is None:
        return f"nobody can see, since {LOCK} may not be read, whether a process trains in {run}"
    return f"nobody is training in {run}"
