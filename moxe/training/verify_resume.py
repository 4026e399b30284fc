"""Is a run that is killed and started again the same as one that never stopped? Killed for real, compared by SHA-256.

Two runs of one recipe, each by the command line: one is left alone, the other is killed with SIGKILL at random points,
some while a checkpoint is being written, and started again by the same command each time until it ends.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from moxe.errors import UserError
from moxe.observability.metrics import read_metrics
from moxe.recipe import Recipe
from moxe.training.checkpoint import Checkpoints

# Files of a checkpoint that hold times, which no two runs share; metrics.jsonl is compared without them.
_HOLD_TIMES = {"trainer_state.json", "progress.json", "metrics.jsonl", "recipe.yaml", "manifest.json"}
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Args:
        step: the last step that had been logged.
        while_saving: whether a checkpoint was being written.
    """

    step: int
    while_saving: bool


@dataclass(frozen=True)
class Verification:
    """What came out.

    Args:
        kills: those that hit a running training.
        undisturbed, killed: SHA-256 of what the two runs left, by name: `model.safetensors`, `metrics.jsonl` without
            its times, and the files of the last checkpoint.
    """

    kills: list[Kill]
    undisturbed: dict[str, str]
    killed: dict[str, str]

    @property
    def is_exact(self) -> bool:
        """Whether the two runs left the same."""
        return self.undisturbed == self.killed


def verify_resume(
    recipe: Recipe, folder: Path, *, kills: int, seed: int = 0, say: Callable[[str], object] = print
) -> Verification:
    """Train `recipe` twice in `folder`, the second time under `kills` kills, and compare.

    Both runs log every step, which changes no weight, so that a kill can be aimed at a step.

    Args:
        recipe: what to train; its name and output folder are not used.
        folder: an empty or a new one.
        kills: how often; every second kill waits for a checkpoint to be written and falls anywhere into that.
        seed: of the random points.
        say: is given a line at each stage.

    Raises:
        UserError: if the folder is not empty, there is nothing to go on from or to kill, or a run fails by itself.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
    recipe = replace(recipe, training=replace(recipe.training, logging_steps=1))
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    say("training once without a kill")
    seconds_a_save = _seconds_a_save(undisturbed)
    steps = _last_step(undisturbed)
    if not 0 < recipe.training.save_steps < steps:
        raise UserError(
            f"training.save_steps={recipe.training.save_steps} gives no checkpoint before the end, step {steps}: there "
            f"would be nothing to go on from; set it to 1 to {steps - 1}"
        )
    say(f"{steps} steps; training again, to be killed {kills} times")
    generator = random.Random(seed)
    targets = sorted(generator.randrange(steps) for _ in range(kills))
    done = []
    for number, target in enumerate(targets):
        kill = _kill_after(killed, target, number % 2 == 1, generator.uniform(0, seconds_a_save))
        if kill is None:
            raise UserError(f"the run ended before kill {number + 1} of {kills}: ask for fewer kills or more steps")
        done.append(kill)
        say(f"kill {len(done)}: after step {kill.step}" + (", while saving" if kill.while_saving else ""))
    with _started(killed) as process:
        process.wait()
    return Verification(done, _hashes(undisturbed), _hashes(killed))


@contextmanager
def _started(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`moxe train` of the run, ended with this block in any case; what it says is in `<run>.log`.

    Raises:
        UserError: if it fails by itself.
    """
    settings = ["--training.output_dir", str(run.parent), "--name", run.name]
    command = [sys.executable, "-m", "moxe", "train", str(run.parent / "recipe.yaml"), *settings]
    log_path = run.with_suffix(".log")
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        is_killed = process.poll() is None
        process.kill()
        process.wait()
    if not is_killed and process.returncode != 0:
        last_words = log_path.read_text(encoding="utf-8", errors="replace").strip()[-500:]
        raise UserError(f"a run failed with exit code {process.returncode}: {last_words}")


def _seconds_a_save(run: Path) -> float:
    """Train a run to its end; how long each of its checkpoints was being written, on average."""
    began, seconds = None, []
    with _started(run) as process:
        while process.poll() is None:
            if began is None and _is_saving(run):
                began = time.perf_counter()
            elif began is not None and not _is_saving(run):
                seconds.append(time.perf_counter() - began)
                began = None
            time.sleep(_POLL_SECONDS)
    return sum(seconds) / max(1, len(seconds))


def _kill_after(run: Path, step: int, while_saving: bool, delay: float) -> Kill | None:
    """Start a run and kill it `delay` seconds after it logged `step`, or after it then begins to save.

    Returns:
        None: it ended before.
    """
    metrics = run / "metrics.jsonl"
    of_the_last_start = metrics.stat().st_ino if metrics.exists() else None
    with _started(run) as process:

        def wait_until(holds: Callable[[], bool]) -> None:
            while process.poll() is None and not holds():
                time.sleep(_POLL_SECONDS)

        wait_until(lambda: metrics.exists() and metrics.stat().st_ino != of_the_last_start)
        wait_until(lambda: _last_step(run) >= step)
        if while_saving:
            wait_until(lambda: _is_saving(run))
        time.sleep(delay)
        ended = process.poll() is not None
    return None if ended else Kill(_last_step(run), _is_saving(run))


def _is_saving(run: Path) -> bool:
    return any(run.glob(".checkpoint-*.unfinished"))


def _last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def _hashes(run: Path) -> dict[str, str]:
    records = read_metrics(run / "metrics.jsonl")
    timeless = [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]
    hashes = {
        "model.safetensors": _sha256(run / "model.safetensors"),
        "metrics.jsonl": hashlib.sha256(json.dumps(timeless).encode()).hexdigest(),
    }
    last = Checkpoints(run).all()[0].path
    for path in sorted(last.iterdir()):
        if path.name not in _HOLD_TIMES:
            hashes[f"{last.name}/{path.name}"] = _sha256(path)
    return hashes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
