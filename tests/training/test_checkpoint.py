"""Checkpoints appear whole or not at all, and damage of any kind is named before anything is read."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moxe.errors import UserError
from moxe.manifest import DamagedError, write_manifest
from moxe.recipe import Recipe
from moxe.training.checkpoint import Checkpoint, Checkpoints
from moxe.training.run import train
from moxe.training.trainer import MoxETrainer
from tests.training.runs import Finished, assert_same_run, quiet

MakeRecipe = Callable[..., Recipe]
FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "optimizer.pt",
    "progress.json",
    "recipe.yaml",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content, or without the file; what was there comes back."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def run(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with its two checkpoints, to be damaged and mended."""
    copy = Path(shutil.copytree(finished.result.path, tmp_path_factory.mktemp("damaged") / "run"))
    shutil.copyfile(copy / "checkpoint-4" / "manifest.json", copy / "manifest-of-4.json")
    return copy


def test_these_are_the_files_of_a_checkpoint(run: Path):
    assert sorted(path.name for path in (run / "checkpoint-4").iterdir()) == sorted(FILES)


def assert_refused(run: Path, name: str) -> None:
    """checkpoint-4 is refused with a sentence that names the file, and checkpoint-2 stands in."""
    checkpoint, (error,) = Checkpoints(run).newest()
    assert checkpoint == Checkpoint(run / "checkpoint-2", 2)
    assert name in str(error)
    assert "checkpoint-4" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", FILES)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.0, bit=0)
def test_a_flipped_bit_is_found(run: Path, name: str, place: float, bit: int):
    path = run / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    with changed(path, bytes(content)):
        if name == "manifest.json" and is_same_manifest(path, run):
            return
        assert_refused(run, "checkpoint-4" if name == "manifest.json" else name)


def is_same_manifest(path: Path, run: Path) -> bool:
    """Whether a flipped bit only exchanged white space."""
    try:
        same = json.loads(path.read_bytes()) == json.loads((run / "manifest-of-4.json").read_bytes())
    except ValueError:
        return False
    return same and Checkpoints(run).newest()[0] == Checkpoint(path.parent, 4)


@pytest.mark.parametrize("name", FILES)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_a_truncated_or_empty_file_is_found(run: Path, name: str, share: float):
    path = run / "checkpoint-4" / name
    content = path.read_bytes()
    with changed(path, content[: int(share * len(content))]):
        assert_refused(run, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(run: Path, name: str):
    with changed(run / "checkpoint-4" / name, None):
        assert_refused(run, name)


@pytest.mark.parametrize(("name", "other"), list(permutations(FILES, 2)))
def test_a_file_that_was_swapped_for_another_is_found(run: Path, name: str, other: str):
    with changed(run / "checkpoint-4" / name, (run / "checkpoint-4" / other).read_bytes()):
        assert_refused(run, name if name != "manifest.json" else "checkpoint-4")


def test_a_checkpoint_under_the_name_of_another_is_found(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoint-4")
    os.rename(copy / "checkpoint-2", copy / "checkpoint-4")
    with pytest.raises(DamagedError, match="checkpoint-4 holds step 2"):
        Checkpoints(copy).newest()


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path):
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-4x"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).newest() == (None, [])


# Killed while writing


def save(run: Path, step: int) -> None:
    """Save a checkpoint, and remove the one before, as the trainer does."""
    checkpoints = Checkpoints(run)
    folder = checkpoints.unfinished(step)
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(json.dumps({"global_step": step}))
    checkpoints.finish(step)
    checkpoints.prune(keep_last=1, best_step=None)


def save_until_killed(run: Path, step: int, calls: int) -> bool:
    """Save in a process of its own that dies at its `calls`-th call to the file system; whether it came to the end."""
    child = os.fork()
    if child == 0:
        left = calls

        def dying(function: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("open", "mkdir", "replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        save(run, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wherever_a_save_is_killed_a_whole_checkpoint_is_left(tmp_path: Path):
    save(tmp_path, 1)
    outcomes = []
    for calls in range(1, 200):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        save(tmp_path, 1)
        came_to_the_end = save_until_killed(tmp_path, 2, calls)
        checkpoint, damage = Checkpoints(tmp_path).newest()
        assert checkpoint is not None
        assert not damage
        outcomes.append(checkpoint.step)
        Checkpoints(tmp_path).remove_unfinished()
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        if came_to_the_end:
            break
    else:
        pytest.fail("it never came to the end")
    assert outcomes == sorted(outcomes)
    assert outcomes.count(1) > len(FILES)
    assert outcomes.count(2) > len(FILES)


def test_every_file_reaches_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    open_, fsync, replace = os.open, os.fsync, os.replace

    def noting_open(path: Path, *args: int, **kwargs: int) -> int:
        descriptor = open_(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", names[descriptor]))

    def noting_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(("replace", Path(target).name))

    monkeypatch.setattr(os, "open", noting_open)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    save(tmp_path, 1)
    named = done.index(("replace", "checkpoint-1"))
    manifest = done.index(("replace", "manifest.json"))
    for name in set(FILES) - {"manifest.json"}:
        assert done.index(("fsync", name)) < manifest
    assert done[manifest - 1][1].startswith(".manifest.json.")
    assert done[manifest + 1] == ("fsync", ".checkpoint-1.unfinished")
    assert manifest + 1 < named
    assert done[named + 1] == ("fsync", tmp_path.name)


# Not to be written


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.pt"])
def test_a_quota_that_is_used_up_leaves_the_last_checkpoint(
    finished: Finished, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, too_large: str
):
    quota = (finished.result.path / "checkpoint-4" / too_large).stat().st_size - 1
    write, limits = MoxETrainer._write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_under_quota(self: MoxETrainer, folder: Path) -> None:
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (quota, limits[1]))
        try:
            write(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(MoxETrainer, "_write_checkpoint", write_under_quota)
        with pytest.raises(UserError, match=r"step 4 cannot be written to .*; the same command goes on from .*-2$"):
            train(recipe, quiet())
    assert not list(recipe.run_dir.glob(".checkpoint-*"))
    train(make_recipe(), quiet())
    assert_same_run(recipe.run_dir, finished.result.path)


DISK_OF_ONE_CHECKPOINT = """
mount -t tmpfs -o size={kibibytes}k none {disk} || exit 77
{python} -m moxe train {recipe} --training.output_dir {disk}
echo exit code $? >&2
ls -A {disk}/default >&2
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
):
    recipe, disk = make_recipe(save_total_limit=2), tmp_path / "disk"
    recipe.save(tmp_path / "default.yaml")
    disk.mkdir()
    of_one = sum(path.stat().st_size for path in (finished.result.path / "checkpoint-4").iterdir())
    script = DISK_OF_ONE_CHECKPOINT.format(
        disk=disk, kibibytes=int(1.7 * of_one / 1024), python=sys.executable, recipe=tmp_path / "default.yaml"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no small file system can be mounted here")
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("moxe: ")]
    assert re.search(
        r"step 4 cannot be written to .*(No space left.*|no more can be written); the same command goes on from .*-2",
        sentence,
    )
    assert "exit code 2" in done.stderr
    assert "checkpoint-2" in done.stderr.splitlines()
    assert not [line for line in done.stderr.splitlines() if line.startswith(".checkpoint")]


def test_a_folder_that_is_not_writable_is_one_sentence(make_recipe: MakeRecipe):
    recipe = make_recipe()
    recipe.training.output_dir = "/proc/moxe"
    with pytest.raises(UserError, match=r"the run folder /proc/moxe/default cannot be made or written: "):
        train(recipe, quiet())


# Not what moxe writes


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def resumable(copied: Path) -> Path:
    """A run whose steps are only partly taken: checkpoint-2 of 4."""
    shutil.rmtree(copied / "checkpoint-4")
    (copied / "evaluation.json").unlink()
    return copied


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_is_refused_and_never_run(resumable: Path, make_recipe: MakeRecipe, tmp_path: Path, name: str):
    marker = tmp_path / "marker"
    (resumable / "checkpoint-2" / name).write_bytes(pickle.dumps(Planted(marker), protocol=2))
    write_manifest(resumable / "checkpoint-2")  # whoever plants it can also vouch for it
    with pytest.raises(UserError, match=r"checkpoint-2 is refused: .* code in a checkpoint is never run"):
        train(make_recipe(), quiet())
    assert not marker.exists()


def test_a_pickle_beside_the_weights_is_not_read(resumable: Path, make_recipe: MakeRecipe, tmp_path: Path):
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        (resumable / "checkpoint-2" / name).write_bytes(pickle.dumps(Planted(marker), protocol=2))
    train(make_recipe(), quiet())
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "progress.json",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\x00", b'{"global_step": "2"}'])
def test_files_that_hold_something_else_are_one_sentence(
    resumable: Path, make_recipe: MakeRecipe, name: str, content: bytes
):
    (resumable / "checkpoint-2" / name).write_bytes(content)
    write_manifest(resumable / "checkpoint-2")
    with pytest.raises(UserError) as error:
        train(make_recipe(), quiet())
    assert "\n" not in str(error.value)
