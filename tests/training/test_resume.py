"""A run that is stopped in whatever way ends, after the same command again, bit for bit as one that was not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

import moxe.training.run as run_module
from moxe.data.corpus import Corpus, prepare
from moxe.data.packing import Block, PackedStream
from moxe.errors import PassingError, Stopped, UserError
from moxe.manifest import write_manifest
from moxe.observability import routing_watch
from moxe.observability.metrics import MetricsFile, read_metrics
from moxe.recipe import Recipe, load_recipe
from moxe.training.checkpoint import Checkpoint, Checkpoints
from moxe.training.run import train
from moxe.training.run_folder import RunFolder
from moxe.training.signals import stop_signals
from moxe.training.trainer import MoxETrainer
from moxe.training.verify_resume import Kill, verify_resume
from tests.training.runs import (
    ALL_STEPS,
    Finished,
    assert_same_run,
    logged_steps,
    quiet,
    timeless_metrics,
    timeless_progress,
)

MakeRecipe = Callable[..., Recipe]
Send = Callable[[], None]


def sender(*signums: int) -> Send:
    """Sends this process the signals, one after the other."""

    def send() -> None:
        for signum in signums:
            os.kill(os.getpid(), signum)

    return send


def at_step(step: int, act: Send, patch: pytest.MonkeyPatch) -> None:
    """`act` just after the training line of a step was written."""
    write = MetricsFile.write

    def write_and_act(self: MetricsFile, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == step and "layers" in record:
            act()

    patch.setattr(MetricsFile, "write", write_and_act)


def before(owner: Any, name: str, act: Send, patch: pytest.MonkeyPatch, *, call: int = 1) -> None:
    """`act` just before the `call`-th call of a function."""
    original = getattr(owner, name)
    calls = 0

    def act_and_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **kwargs)

    patch.setattr(owner, name, act_and_call)


def stop(recipe: Recipe, arrange: Callable[[pytest.MonkeyPatch], None]) -> Stopped:
    """Train until the signal that `arrange` plants."""
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch)
        with pytest.raises(Stopped) as stopped:
            train(recipe, quiet())
    return stopped.value


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(finished: Finished, make_recipe: MakeRecipe, signum):
    recipe = make_recipe(save_steps=0)
    stopped = stop(recipe, lambda patch: before(MoxETrainer, "training_step", sender(signum), patch, call=3))
    assert stopped.signum == signum
    where = f"the same command goes on from {recipe.run_dir / 'checkpoint-3'}"
    assert str(stopped) == f"stopped by {signum.name}; {where}"
    assert not (recipe.run_dir / "model.safetensors").exists()
    assert logged_steps(recipe.run_dir)[-1] == (3, "training")
    train(make_recipe(save_steps=0), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_serves(finished: Finished, make_recipe: MakeRecipe):
    recipe = make_recipe()
    twice = sender(signal.SIGTERM, signal.SIGTERM)
    stopped = stop(recipe, lambda patch: before(MoxETrainer, "training_step", twice, patch, call=4))
    assert "checkpoint-2" in str(stopped)
    train(make_recipe(), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)


@pytest.mark.parametrize("validation", [1, 2])
def test_a_signal_during_validation_saves_and_the_validation_is_made_up(
    finished: Finished, make_recipe: MakeRecipe, validation: int
):
    recipe = make_recipe(save_steps=0)
    send = sender(signal.SIGTERM)
    stopped = stop(recipe, lambda patch: before(MoxETrainer, "evaluation_loop", send, patch, call=validation))
    assert f"checkpoint-{2 * validation}" in str(stopped)
    assert logged_steps(recipe.run_dir)[-1] == (2 * validation, "training")
    train(make_recipe(save_steps=0), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)


def test_a_signal_while_a_validation_is_made_up_leaves_it_to_the_next_time(finished: Finished, make_recipe: MakeRecipe):
    recipe = make_recipe(save_steps=0)
    for _ in range(2):
        stop(recipe, lambda patch: before(MoxETrainer, "evaluation_loop", sender(signal.SIGTERM), patch))
        assert logged_steps(recipe.run_dir)[-1] == (2, "training")
    train(make_recipe(save_steps=0), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)


@pytest.mark.parametrize("name", ["prepare", "build_model"])
def test_a_signal_before_the_first_step_stops_at_once(make_recipe: MakeRecipe, name: str):
    recipe = make_recipe()
    stopped = stop(recipe, lambda patch: before(run_module, name, sender(signal.SIGTERM), patch))
    assert str(stopped) == "stopped by SIGTERM; the same command starts again"
    assert not recipe.run_dir.exists()


@pytest.mark.parametrize("name", ["draw_run", "evaluate_perplexity", "generate_text"])
def test_a_signal_after_the_last_step_leaves_only_the_evaluation_to_do(
    finished: Finished, make_recipe: MakeRecipe, name: str
):
    recipe = make_recipe()
    stopped = stop(recipe, lambda patch: before(run_module, name, sender(signal.SIGINT), patch))
    assert "checkpoint-4" in str(stopped)
    assert not (recipe.run_dir / "evaluation.json").exists()
    result = train(make_recipe(), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)
    assert result.evaluation is not None
    assert finished.result.evaluation is not None
    for part in ("validation", "baselines", "sample"):
        assert result.evaluation[part] == finished.result.evaluation[part]


def test_an_interval_that_a_stop_cuts_in_two_is_logged_whole(make_recipe: MakeRecipe):
    settings = {"logging_steps": 3, "max_steps": 7, "save_steps": 0}
    whole = train(make_recipe(name="whole", **settings), quiet()).path
    recipe = make_recipe(name="parts", **settings)
    for call in (2, 3):  # after step 2, then two steps later
        stop(recipe, lambda patch, call=call: before(MoxETrainer, "training_step", sender(15), patch, call=call))
    assert [checkpoint.step for checkpoint in Checkpoints(recipe.run_dir).all()] == [5, 2]
    train(make_recipe(name="parts", **settings), quiet())
    assert_same_run(recipe.run_dir, whole)


def test_accumulation_over_several_epochs_goes_on_in_the_middle_of_one(make_recipe: MakeRecipe):
    settings = {"max_steps": 9, "gradient_accumulation_steps": 3, "batch_size": 4, "eval_steps": 4, "save_steps": 0}
    whole = train(make_recipe(name="whole", **settings), quiet()).path
    recipe = make_recipe(name="parts", **settings)
    for step in (2, 5, 8):
        stop(recipe, lambda patch, step=step: at_step(step, sender(signal.SIGTERM), patch))
    train(make_recipe(name="parts", **settings), quiet())
    assert max(record["epoch"] for record in timeless_metrics(whole)) > 1
    assert_same_run(recipe.run_dir, whole)


def test_the_balancing_biases_of_experts_go_on_where_they_were(make_recipe: MakeRecipe):
    def balanced(name: str) -> Recipe:
        recipe = make_recipe(name=name, max_steps=5, gradient_accumulation_steps=2, save_steps=0, eval_steps=0)
        return replace(recipe, model={**recipe.model, "load_balancing": "bias", "balancing_bias_rate": 0.05})

    whole = train(balanced("whole"), quiet()).path
    for step in (1, 3):
        stop(balanced("parts"), lambda patch, step=step: at_step(step, sender(signal.SIGTERM), patch))
    result = train(balanced("parts"), quiet())
    assert_same_run(result.path, whole)
    biases = [x for name, x in load_file(whole / "model.safetensors").items() if name.endswith("balancing_bias")]
    assert len(biases) == 2
    assert all(bias.any() for bias in biases)


def stream_in_place_of_the_dataset(opened: list[tuple[int, int]]) -> Callable[..., Corpus]:
    """`prepare`, but the training documents come as a stream, in another order in each pass."""

    def prepare_stream(config: Any, *, seed: int, progress: bool = True) -> Corpus:
        corpus = prepare(config, seed=seed, progress=False)
        documents = list(corpus.train.documents)[:7]  # type: ignore[union-attr]

        def open_blocks(epoch: int, place: dict[str, Any] | None) -> Iterator[Block]:
            for number in range(0 if place is None else place["number"], 3):
                opened.append((epoch, number))
                part = documents[number::3]
                order = np.random.default_rng(epoch).permutation(len(part))
                yield Block({"number": number}, [part[index] for index in order])

        stream = PackedStream(open_blocks, sequence_length=config.sequence_length, pad_token_id=1)
        return replace(corpus, train=stream)

    return prepare_stream


def test_a_stream_goes_on_where_it_was_over_several_passes(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "batch_size": 2, "eval_steps": 0, "save_steps": 0}
    opened: list[tuple[int, int]] = []
    monkeypatch.setattr(run_module, "prepare", stream_in_place_of_the_dataset(opened))
    whole = train(make_recipe(name="whole", **settings), quiet()).path
    assert opened[-1][0] >= 2
    recipe = make_recipe(name="parts", **settings)
    for step in (2, 5, 8):
        stop(recipe, lambda patch, step=step: at_step(step, sender(signal.SIGTERM), patch))
        opened.clear()
    train(make_recipe(name="parts", **settings), quiet())
    assert (0, 0) not in opened
    assert_same_run(recipe.run_dir, whole)


def test_a_run_does_not_go_on_with_data_that_have_changed(text_file: Path, make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe()
    recipe.data.source = str(shutil.copyfile(text_file, tmp_path / "text.txt"))
    stop(recipe, lambda patch: at_step(3, sender(signal.SIGTERM), patch))
    with (tmp_path / "text.txt").open("a") as file:
        file.write("one more dog\n")
    again = make_recipe()
    again.data.source = recipe.data.source
    with pytest.raises(UserError, match=r"the data \(or the tokenizer\) have changed since the run in .* was started"):
        train(again, quiet())


def test_what_the_watch_of_the_routing_has_seen_is_remembered(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routing_watch, "dead_bound", lambda num_experts: 2.0)  # no expert ever gets so much
    whole = train(make_recipe(name="whole"), quiet()).path
    recipe = make_recipe(name="parts")
    stop(recipe, lambda patch: at_step(2, sender(signal.SIGTERM), patch))
    train(make_recipe(name="parts"), quiet())
    assert timeless_progress(whole / "checkpoint-4")["routing_watch"]["low"]
    assert_same_run(recipe.run_dir, whole)


def test_skipped_steps_are_counted_on(make_recipe: MakeRecipe):
    def poison(patch: pytest.MonkeyPatch) -> None:
        step = MoxETrainer.training_step

        def poisoned(self: MoxETrainer, model: Any, *args: Any) -> Any:
            loss = step(self, model, *args)
            if self.state.global_step == 1:
                model.lm_head.weight.grad[0, 0] = float("nan")
            return loss

        patch.setattr(MoxETrainer, "training_step", poisoned)

    settings = {"on_nonfinite": "skip", "save_steps": 0}
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        whole = train(make_recipe(name="whole", **settings), quiet()).path
    recipe = make_recipe(name="parts", **settings)

    def poison_and_stop(patch: pytest.MonkeyPatch) -> None:
        poison(patch)
        at_step(3, sender(signal.SIGTERM), patch)

    stop(recipe, poison_and_stop)
    train(make_recipe(name="parts", **settings), quiet())
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "layers" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert (recipe.run_dir / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    again = [line for line in read_metrics(recipe.run_dir / "metrics.jsonl") if "layers" in line]
    assert [line["skipped_steps"] for line in again] == [0, 1, 1, 1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    finished: Finished, copied: Path, make_recipe: MakeRecipe
):
    (copied / "evaluation.json").unlink()
    (copied / "model.safetensors").unlink()
    content = bytearray((copied / "checkpoint-4" / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "checkpoint-4" / "optimizer.pt").write_bytes(content)
    output = io.StringIO()
    train(make_recipe(save_total_limit=2), Console(file=output, width=100))
    printed = " ".join(output.getvalue().split())
    assert "checkpoint-4/optimizer.pt is not what was written" in printed
    assert "going on from checkpoint-2 instead" in printed
    assert (copied / "damaged-checkpoint-4" / "optimizer.pt").exists()
    assert_same_run(copied, finished.result.path)


def test_a_run_without_an_undamaged_checkpoint_is_not_begun_again_by_itself(copied: Path, make_recipe: MakeRecipe):
    (copied / "evaluation.json").unlink()
    for step in (2, 4):
        (copied / f"checkpoint-{step}" / "manifest.json").unlink()
    files = {file for file in copied.rglob("*")}
    with pytest.raises(UserError, match=r"no checkpoint of .* is undamaged .*checkpoint-4 has no manifest"):
        train(make_recipe(save_total_limit=2), quiet())
    assert {file for file in copied.rglob("*")} == files


def test_lost_and_damaged_metrics_come_back_from_the_checkpoint(
    finished: Finished, copied: Path, make_recipe: MakeRecipe
):
    shutil.rmtree(copied / "checkpoint-4")
    (copied / "evaluation.json").unlink()
    (copied / "metrics.jsonl").write_bytes(b"\xff garbage")
    train(make_recipe(), quiet())
    assert_same_run(copied, finished.result.path)


def test_two_processes_do_not_train_in_one_folder(make_recipe: MakeRecipe):
    recipe = make_recipe()
    recipe.run_dir.mkdir()
    with FileLock(recipe.run_dir / ".lock"), pytest.raises(UserError, match="another process is training in"):
        train(recipe, quiet())
    assert {path.name for path in recipe.run_dir.iterdir()} == {".lock"}


def test_the_best_checkpoint_is_saved_and_kept(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5}
    loop = MoxETrainer.evaluation_loop

    def with_loss(self: MoxETrainer, *args: Any, **kwargs: Any) -> Any:
        output = loop(self, *args, **kwargs)
        output.metrics["eval_lm_loss"] = losses[self.state.global_step]
        return output

    monkeypatch.setattr(MoxETrainer, "evaluation_loop", with_loss)
    settings = {"eval_steps": 1, "save_steps": 0, "save_best": True, "save_total_limit": 1}
    recipe = make_recipe(**settings)
    stop(recipe, lambda patch: at_step(3, sender(signal.SIGTERM), patch))
    assert [checkpoint.step for checkpoint in Checkpoints(recipe.run_dir).all()] == [3, 2]
    train(make_recipe(**settings), quiet())
    assert [checkpoint.step for checkpoint in Checkpoints(recipe.run_dir).all()] == [4, 2]


def test_intervals_may_change_when_a_run_goes_on(finished: Finished, make_recipe: MakeRecipe):
    recipe = make_recipe()
    stop(recipe, lambda patch: at_step(2, sender(signal.SIGTERM), patch))
    train(make_recipe(save_steps=1, save_total_limit=9, logging_steps=2), quiet())
    assert [checkpoint.step for checkpoint in Checkpoints(recipe.run_dir).all()] == [4, 3, 2]
    assert logged_steps(recipe.run_dir) == [entry for entry in ALL_STEPS if entry != (3, "training")]
    final = "model.safetensors"
    assert (recipe.run_dir / final).read_bytes() == (finished.result.path / final).read_bytes()


def test_another_machine_is_noted_each_time(make_recipe: MakeRecipe):
    recipe = make_recipe(max_steps=6)
    stop(recipe, lambda patch: at_step(2, sender(signal.SIGTERM), patch))
    path = recipe.run_dir / "versions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "Another"}))
    stop(recipe, lambda patch: at_step(4, sender(signal.SIGTERM), patch))
    output = io.StringIO()
    train(make_recipe(max_steps=6), Console(file=output, width=100))
    assert output.getvalue().count("note: ") == 1
    assert "note: cpu Another is now" in output.getvalue()


def test_another_number_of_processes_is_refused(copied: Path, make_recipe: MakeRecipe):
    (copied / "evaluation.json").unlink()
    path = copied / "checkpoint-4" / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    write_manifest(path.parent)
    with pytest.raises(UserError, match="was started with 2 processes and goes on with as many alone, not 1"):
        train(make_recipe(), quiet())


def test_a_recipe_that_a_power_cut_emptied_is_taken_from_the_checkpoint(
    finished: Finished, copied: Path, make_recipe: MakeRecipe
):
    (copied / "evaluation.json").unlink()
    (copied / "recipe.yaml").write_text("")
    train(make_recipe(), quiet())
    assert_same_run(copied, finished.result.path)
    assert (copied / "recipe.yaml").stat().st_size > 0


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(copied: Path, make_recipe: MakeRecipe):
    finished_evaluation = RunFolder.finished_evaluation
    asked = []

    def finished_at_the_second_look(self: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
        asked.append(self)
        return finished_evaluation(self, recipe) if len(asked) == 2 else None

    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.name != ".lock"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finished_evaluation", finished_at_the_second_look)
        train(make_recipe(), quiet())
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.name != ".lock"} == before


def test_a_run_whose_model_is_gone_is_not_finished(finished: Finished, copied: Path, make_recipe: MakeRecipe):
    (copied / "model.safetensors").unlink()
    train(make_recipe(), quiet())
    assert_same_run(copied, finished.result.path)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_set_aside(copied: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        with pytest.raises(PassingError, match="Too many open files"):
            Checkpoints(copied).newest()
    assert Checkpoints(copied).newest()[0] == Checkpoint(copied / "checkpoint-4", 4)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Checkpoints, "prune", fail)
    output = io.StringIO()
    train(make_recipe(), Console(file=output, width=100))
    assert "warning: an old checkpoint cannot be removed" in output.getvalue()


def test_the_seconds_of_training_are_those_of_all_parts(make_recipe: MakeRecipe):
    recipe = make_recipe()
    stop(recipe, lambda patch: at_step(2, sender(signal.SIGTERM), patch))
    (path,) = recipe.run_dir.glob("checkpoint-*/progress.json")
    progress = json.loads(path.read_text())
    assert 0 < progress["seconds"] < 100
    path.write_text(json.dumps({**progress, "seconds": 1000.0}))
    write_manifest(path.parent)
    evaluation = train(make_recipe(), quiet()).evaluation
    assert evaluation is not None
    assert 1000 < evaluation["training"]["seconds"] < 1100


def test_what_a_kill_left_half_written_is_removed(copied: Path, make_recipe: MakeRecipe):
    (copied / "evaluation.json").unlink()
    (copied / ".checkpoint-5.unfinished").mkdir()
    (copied / ".checkpoint-1.removed").mkdir()
    for name in (".model-abc.unfinished", ".recipe.yaml.123.unfinished", ".metrics.jsonl.123.unfinished"):
        (copied / name).write_text("")
    train(make_recipe(), quiet())
    assert {path.name for path in copied.iterdir() if path.name.startswith(".")} == {".lock"}


def test_signals_mean_afterwards_what_they_meant_before(make_recipe: MakeRecipe):
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stop(make_recipe(), lambda patch: at_step(2, sender(signal.SIGTERM), patch))
    assert {signum: signal.getsignal(signum) for signum in handlers} == handlers


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, previous)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines_so_far(run)):
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines_so_far(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def start_command(recipe: Recipe, tmp_path: Path, **streams: Any) -> subprocess.Popen[bytes]:
    recipe.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "moxe", "train", str(tmp_path / "recipe.yaml")]
    return subprocess.Popen(command, **streams)


def test_a_terminal_that_is_closed_does_not_lose_the_run(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe(max_steps=100_000, eval_steps=0, save_steps=0)
    terminal, inside = pty.openpty()
    process = start_command(
        recipe,
        tmp_path,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    wait_for_step(recipe.run_dir, 3, process)
    os.close(terminal)  # the kernel sends SIGHUP, and every write fails from now on
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert Checkpoints(recipe.run_dir).newest()[0] is not None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_readers_that_are_gone_do_not_lose_the_run(make_recipe: MakeRecipe, tmp_path: Path, signum: int):
    recipe = make_recipe(max_steps=100_000, eval_steps=0, save_steps=0)
    process = start_command(recipe, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    wait_for_step(recipe.run_dir, 3, process)
    process.stdout.close()
    process.stderr.close()
    wait_for_step(recipe.run_dir, 6, process)
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    assert Checkpoints(recipe.run_dir).newest()[0] is not None


def kill_and_compare(recipe: Recipe, folder: Path, kills: int) -> list[Kill]:
    found = verify_resume(recipe, folder, kills=kills, say=lambda line: None)
    assert len(found.kills) == kills
    assert {"model.safetensors", "metrics.jsonl"} <= found.undisturbed.keys()
    assert any(name.endswith("/optimizer.pt") for name in found.undisturbed)
    assert found.killed == found.undisturbed
    return found.kills


def test_three_kills_change_nothing(make_recipe: MakeRecipe, tmp_path: Path):
    kill_and_compare(make_recipe(max_steps=12, save_steps=3, eval_steps=5, sample_tokens=0), tmp_path / "runs", 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_change_nothing(tmp_path: Path):
    overrides = {"training": {"max_steps": 120, "save_steps": 7, "eval_steps": 25, "sample_tokens": 0}}
    done = kill_and_compare(load_recipe("default", overrides), tmp_path / "runs", 30)
    assert sum(kill.while_saving for kill in done) >= 5
    assert sum(not kill.while_saving for kill in done) >= 5


@pytest.mark.slow
def test_two_processes_that_are_stopped_between_two_log_lines_go_on_exactly(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe(max_steps=10, logging_steps=4, eval_steps=5, save_steps=5, sample_tokens=0)
    recipe.save(tmp_path / "recipe.yaml")

    def start(name: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
        return subprocess.Popen([*launcher, "moxe", "train", str(tmp_path / "recipe.yaml"), "--name", name])

    assert start("whole").wait() == 0
    stopped = start("parts")
    wait_for_step(tmp_path / "parts", 5, stopped)
    stopped.terminate()
    assert stopped.wait() != 0
    (saved,) = Checkpoints(tmp_path / "parts").all()
    assert saved.step in (5, 6, 7)  # between the lines of steps 4 and 8
    assert start("parts").wait() == 0
    whole, parts = (timeless_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    for line, expected in zip(parts, whole, strict=True):
        assert line["loss" if "loss" in line else "validation_loss"] == pytest.approx(
            expected["loss" if "loss" in line else "validation_loss"], rel=1e-12
        )
    final = "model.safetensors"
    assert (tmp_path / "parts" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_and_saves_both(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe(max_steps=100_000, eval_steps=0, save_steps=0, sample_tokens=0)
    recipe.save(tmp_path / "recipe.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "moxe", "train"]
    process = subprocess.Popen([*launcher, str(tmp_path / "recipe.yaml")])
    wait_for_step(recipe.run_dir, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert Checkpoints(recipe.run_dir).newest()[0] is not None
    assert not (recipe.run_dir / "model.safetensors").exists()
    assert not (recipe.run_dir / "evaluation.json").exists()
