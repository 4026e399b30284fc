import errno
import os
import random
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import datasets
import numpy as np
import pytest

from moxe.data import build, journal, tokens
from moxe.data import corpus as corpus_module
from moxe.data.corpus import prepare
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import PassingError, UserError
from moxe.manifest import MANIFEST


def cached(config):
    """The finished folders of the cache, by name: the bytes of each file."""
    root = corpus_module.Path(config.cache_dir)
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches and an entry in the journal for each."""
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 200)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_ENTRIES", 0)


@pytest.fixture
def expected(config, tmp_path):
    """The files of an undisturbed build."""
    settings = config(cache_dir=str(tmp_path / "undisturbed"))
    prepare(settings, seed=0)
    return cached(settings)


def in_a_child(function, kill_after=None):
    """Runs a function in another process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(number, *places):
    """Makes the n-th call of any of these functions the last thing that this process does."""
    calls = 0
    for module, name in places:
        original = getattr(module, name)

        def call(*arguments, original=original, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, call)


# Of the small source under `small_batches`.
NUM_BATCHES = 15

# Between any two of these the files on the disk differ.
DISK = [(os, "fsync"), (os, "replace"), (build, "write_manifest"), (build, "_remove_others"), (np, "save")]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_again_and_again_it_ends_with_the_very_files_of_an_undisturbed_build(
    config, expected, small_batches, num_workers
):
    settings = config(num_workers=num_workers)
    kills = 0
    # Each process gets a little further than the one before, so every place is the last one of some process.
    for number in range(1, 400):

        def attempt(number=number):
            kill_at(number, *DISK)
            prepare(settings, seed=0, progress=False)

        if in_a_child(attempt) == 0:
            break
        kills += 1
    assert kills > 10
    assert cached(settings) == expected


def test_killed_at_the_same_place_in_every_process_it_still_gets_on(config, expected, small_batches):
    settings = config(num_workers=1)

    def attempt():
        kill_at(31, *DISK)
        prepare(settings, seed=0, progress=False)

    attempts = 1
    while in_a_child(attempt) and attempts < 200:
        attempts += 1
    assert 1 < attempts < 200
    assert cached(settings) == expected


def test_killed_at_random_it_ends_with_the_very_files_of_an_undisturbed_build(
    config, expected, small_batches, tmp_path
):
    settings = config(num_workers=2)
    moments = random.Random(0)
    kills_during_a_build = 0
    attempts = 1
    # Each a little later than the one before, until there is nothing left to kill.
    while in_a_child(
        lambda: prepare(settings, seed=0, progress=False), kill_after=moments.uniform(0.01, 0.05) * attempts
    ):
        kills_during_a_build += any((tmp_path / "cache").glob(".*.unfinished"))
        attempts += 1
    assert kills_during_a_build
    prepare(settings, seed=0)
    assert cached(settings) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, PassingError])
def test_what_was_made_before_an_interruption_is_used(config, expected, small_batches, monkeypatch, capsys, error):
    settings = config(num_workers=1)
    append = journal.TokenJournal.append
    appended = 0

    def interrupt(self, encoded, place):
        nonlocal appended
        appended += 1
        append(self, encoded, place)
        if appended == 5:
            raise error("stop")

    monkeypatch.setattr(journal.TokenJournal, "append", interrupt)
    with pytest.raises(error, match="stop"):
        prepare(settings, seed=0)
    for name in ("hold_out", "train_tokenizer"):  # those parts were finished
        monkeypatch.setattr(build, name, None)
    prepare(settings, seed=0)
    assert cached(settings) == expected
    assert "Tokenising was interrupted after" in capsys.readouterr().err
    assert appended == NUM_BATCHES


def test_an_interruption_leaves_no_worker(config, small_batches, monkeypatch):
    processes = []
    start = subprocess.Popen

    def remember(*arguments, **options):
        processes.append(start(*arguments, **options))
        return processes[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moxe.data.workers.subprocess.Popen", remember)
    monkeypatch.setattr(journal.TokenJournal, "append", interrupt)
    with pytest.raises(KeyboardInterrupt) as interruption:
        prepare(config(num_workers=2), seed=0)
    assert interruption.traceback  # which holds on to every frame
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_the_bar_of_a_build_that_was_picked_up_begins_where_it_was_left(config, small_batches, monkeypatch):
    for max_tokens, label in ((None, "Tokenising, picked up"), (900, "Tokenising, picked up")):
        settings = config(num_workers=1, max_tokens=max_tokens)
        with monkeypatch.context() as patch:
            append = journal.TokenJournal.append

            def interrupt(self, encoded, place, append=append):
                append(self, encoded, place)
                if self.num_tokens > 300:
                    raise KeyboardInterrupt

            patch.setattr(journal.TokenJournal, "append", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(settings, seed=0)
        bars: list[tuple[str, int]] = []
        with monkeypatch.context() as patch:
            add_task = build.Progress.add_task

            def remember(self, description, *arguments, add_task=add_task, bars=bars, **options):
                bars.append((description, options.get("completed", 0)))
                return add_task(self, description, *arguments, **options)

            patch.setattr(build.Progress, "add_task", remember)
            prepare(settings, seed=0)
        assert label in dict(bars)
        assert (dict(bars)[label] > 300) == (max_tokens is not None)


@pytest.mark.parametrize("max_tokens", [101, 400, 401, 10_000])
def test_max_tokens_are_met_exactly_after_an_interruption(config, small_batches, tmp_path, max_tokens):
    whole = config(max_tokens=max_tokens, cache_dir=str(tmp_path / "whole"))
    prepare(whole, seed=0)
    settings = config(max_tokens=max_tokens, num_workers=2)
    for number in (20, 24, 28, 32, 500):

        def attempt(number=number):
            kill_at(number, *DISK)
            prepare(settings, seed=0, progress=False)

        in_a_child(attempt)
    assert cached(settings) == cached(whole)


def test_reading_the_hub_goes_on_where_it_was_left(hub, config, small_batches, monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 20)
    whole = config(source="owner/name", validation_documents=2, max_tokens=1000, cache_dir=str(tmp_path / "whole"))
    prepare(whole, seed=0)
    settings = config(source="owner/name", validation_documents=2, max_tokens=1000, num_workers=1)
    rows = datasets.IterableDataset.__iter__

    def stop_after(count, error):
        def iterate(self):
            for number, row in enumerate(rows(self)):
                if self._starting_state_dict is None and number == count and build_reached_training:
                    raise error
                given.append(row["text"])
                yield row

        return iterate

    given: list[str] = []
    build_reached_training: list[bool] = []
    write = build._write_training_tokens

    def remember(*arguments):
        build_reached_training.append(True)
        given.clear()
        return write(*arguments)

    monkeypatch.setattr(build, "_write_training_tokens", remember)
    monkeypatch.setattr("datasets.IterableDataset.__iter__", stop_after(5, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, seed=0)
    assert len(given) == 5
    prepare(settings, seed=0)
    assert len(given) == 3
    assert cached(settings) == cached(whole)


@pytest.mark.parametrize("broken", ["source", "tokenizer", "later"])
def test_bad_data_leave_nothing_behind(config, source, tmp_path, broken, monkeypatch):
    settings = config()
    if broken == "source":
        source.write_bytes(source.read_bytes() + b"\xff")
    elif broken == "tokenizer":
        train_tokenizer(["some words"], 300).save_pretrained(tmp_path)
        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: 100)
        settings = config(tokenizer=str(tmp_path / "tokenizer.json"))
    else:
        monkeypatch.setattr(build, "encode_batches", lambda *_: (_ for _ in ()).throw(UserError("broken")))
    with pytest.raises(UserError):
        prepare(settings, seed=0)
    assert not cached(settings)


def test_a_full_disk_keeps_what_was_made(config, expected, small_batches, monkeypatch, capsys):
    settings = config(num_workers=1)
    with monkeypatch.context() as patch:
        enter = journal.TokenJournal.enter

        def fill_the_disk(self):
            if self.num_documents > 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            enter(self)

        patch.setattr(journal.TokenJournal, "enter", fill_the_disk)
        with pytest.raises(PassingError, match=r"data\.cache_dir .* cannot be written: No space left on device; once"):
            prepare(settings, seed=0)
    prepare(settings, seed=0)
    assert "Tokenising was interrupted after" in capsys.readouterr().err
    assert cached(settings) == expected


def test_a_full_disk_under_the_tokenizer_keeps_what_was_made(config, expected, monkeypatch):
    settings = config()
    with monkeypatch.context() as patch:
        full = Exception("No space left on device (os error 28)")  # as the tokenizers library says it
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(PassingError, match=r"data\.cache_dir .* cannot be written: No space left on device"):
            prepare(settings, seed=0)
    monkeypatch.setattr(build, "hold_out", None)
    prepare(settings, seed=0)
    assert cached(settings) == expected


def test_tokens_of_two_versions_of_the_tokenizers_library_are_not_mixed(config, expected, small_batches, monkeypatch):
    settings = config(num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(build.tokenizers, "__version__", "0.1")
        patch.setattr(journal.TokenJournal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, seed=0)
    appended = []
    append = journal.TokenJournal.append
    monkeypatch.setattr(journal.TokenJournal, "append", lambda *all: (appended.append(1), append(*all)))
    prepare(settings, seed=0)
    assert len(appended) == NUM_BATCHES
    assert cached(settings) == expected


def test_a_cache_that_cannot_be_read_is_left_alone(config, monkeypatch):
    settings = config()
    prepare(settings, seed=0)
    before = cached(settings)

    def fail(path, mode):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("moxe.manifest.Path.open", fail)
        with pytest.raises(PassingError, match="Too many open files"):
            prepare(settings, seed=0)
    assert cached(settings) == before


def test_a_file_system_without_locks_is_told(config, monkeypatch):
    monkeypatch.setattr(build.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError("flock")))
    with pytest.raises(UserError, match=r"data\.cache_dir .* cannot be written: it has no file locks \(flock\)"):
        prepare(config(), seed=0)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("a bug below")])
def test_a_hub_that_fails_in_whatever_way_keeps_what_was_made(hub, config, small_batches, monkeypatch, error):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 20)
    settings = config(source="owner/name", validation_documents=2, max_tokens=1000, num_workers=1)
    with monkeypatch.context() as patch:
        rows = datasets.IterableDataset.__iter__
        write = build._write_training_tokens
        failing = []

        def fail(self):
            for number, row in enumerate(rows(self)):
                if failing and number == 5:
                    raise error
                yield row

        patch.setattr("datasets.IterableDataset.__iter__", fail)
        patch.setattr(build, "_write_training_tokens", lambda *all: (failing.append(1), write(*all)))
        with pytest.raises(PassingError, match=r"Reading 'owner/name' broke off after row 5: "):
            prepare(settings, seed=0)
    for name in ("_validation_texts", "train_tokenizer"):  # those parts were finished
        monkeypatch.setattr(build, name, None)
    assert prepare(settings, seed=0).statistics.train_documents == 6


def test_of_two_at_once_one_builds_and_the_other_waits(config, expected, monkeypatch, capsys):
    settings = config()
    building, go_on = threading.Event(), threading.Event()
    builds = []
    write = build._write

    def write_slowly(*arguments):
        builds.append(arguments)
        building.set()
        assert go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(build, "_write", write_slowly)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(prepare, settings, seed=0)
        assert building.wait(60)
        second = threads.submit(prepare, settings, seed=0)
        sleep(1.5)
        assert not second.done()
        go_on.set()
        assert not first.result().statistics.cached
        assert second.result().statistics.cached
    assert len(builds) == 1
    assert cached(settings) == expected
    assert "Another process tokenises the same data; waiting for it." in capsys.readouterr().err


def test_the_number_of_workers_does_not_change_the_files(config, expected, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 300)
    settings = config(num_workers=3)
    prepare(settings, seed=0)
    assert cached(settings) == expected


@pytest.mark.parametrize(
    "damage", ["flipped", "short", "missing", "emptied", "no manifest", "bad manifest", "unlisted"]
)
def test_a_damaged_cache_is_named_and_made_again(config, expected, tmp_path, damage, capsys):
    settings = config()
    prepare(settings, seed=0)
    names = sorted(name for name in cached(settings) if not name.endswith(MANIFEST))
    assert len(names) == 9
    for name in names if damage in ("flipped", "short", "missing", "emptied") else names[:1]:
        path = tmp_path / "cache" / name
        content = path.read_bytes()
        folder = tmp_path / "cache" / name.split("/")[0]
        if damage == "flipped":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        elif damage == "short":
            path.write_bytes(content[:-1])
        elif damage == "missing":
            path.unlink()
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "no manifest":
            path = folder / MANIFEST
            path.unlink()
        elif damage == "bad manifest":
            path = folder / MANIFEST
            path.write_text("{")
        else:
            path = folder / MANIFEST
            path.write_text('{"version": 1, "files": {}}')
        capsys.readouterr()
        corpus = prepare(settings, seed=0)
        assert not corpus.statistics.cached
        told = capsys.readouterr().err
        assert told.startswith("Tokenised data are damaged and are made again: ")
        assert path.name in told
        assert cached(settings) == expected
        assert prepare(settings, seed=0).statistics.cached


def test_a_tokenizer_with_ids_beyond_its_size_is_refused(config, tmp_path, monkeypatch):
    train_tokenizer(["some words"], 300).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: 100)
    with pytest.raises(UserError, match=r"gives the id \d+, but has 100 tokens"):
        prepare(config(tokenizer=str(tmp_path / "tokenizer.json")), seed=0)
