import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from time import monotonic, sleep

import pytest

from moxe.data import encoding as encoding_module
from moxe.data import tokens, workers
from moxe.data.encoding import document_hash
from moxe.data.tokenizer import train_tokenizer
from moxe.data.tokens import encoding_of, text_batches
from moxe.data.workers import encode_batches
from moxe.errors import PassingError, Stopped, UserError

DOCUMENTS = [f"The cat sat on {'abcdefghij'[i % 10]} mat." + " And again." * (i // 10) for i in range(60)]
ENCODING = encoding_of(train_tokenizer(DOCUMENTS, 300), map(document_hash, DOCUMENTS[3:40:9]))


@dataclass(frozen=True)
class Texts:
    texts: list[str]


def batches(count=12):
    return [Texts(DOCUMENTS[start::count]) for start in range(count)]


def encoded(num_workers, encoding=ENCODING, given=None):
    results = encode_batches(batches() if given is None else given, encoding, num_workers)
    return [(batch.texts, ids.tobytes(), lengths.tolist()) for batch, (ids, lengths) in results]


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    processes = []
    original = subprocess.Popen

    def start(*arguments, **options):
        processes.append(original(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr("moxe.data.workers.subprocess.Popen", start)
    return processes


@pytest.mark.parametrize("num_workers", [2, 3, None])
def test_processes_change_nothing(started, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "own_cores", lambda: 2)
    expected = encoded(1)
    assert not started
    assert sum(len(lengths) for _, _, lengths in expected) == len(DOCUMENTS) - 5
    assert encoded(num_workers) == expected
    assert len(started) == (num_workers or 2)
    assert all(process.poll() is not None for process in started)


def test_few_batches_start_no_process(started):
    few = batches()[: workers.BATCHES_WITHOUT_WORKERS - 1]
    assert encoded(2, given=few) == encoded(1, given=few)
    assert encoded(2, given=[]) == []
    assert not started


def test_no_more_is_read_than_keeps_the_workers_busy():
    read = []
    results = encode_batches((read.append(batch) or batch for batch in batches(30)), ENCODING, 2)
    next(results)
    results.close()
    assert len(read) <= workers.BATCHES_WITHOUT_WORKERS + 2 * workers.BATCHES_A_WORKER


def test_a_worker_that_is_killed_is_one_sentence(started):
    def killing():
        for number, batch in enumerate(batches()):
            if number == 6:
                started[0].send_signal(signal.SIGKILL)
                started[0].wait()
            yield batch

    with pytest.raises(PassingError, match=r"A process that tokenises has died \(signal 9\); start again"):
        encoded(2, given=killing())
    assert all(process.poll() is not None for process in started)


def test_a_worker_that_never_answers_does_not_keep_an_interruption_waiting(started):
    results = encode_batches(batches(), ENCODING, 2)
    next(results)
    for process in started:
        process.send_signal(signal.SIGSTOP)
    start = monotonic()
    results.close()
    assert monotonic() - start < 10
    assert all(process.poll() is not None for process in started)


def test_a_worker_that_cannot_start_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(PassingError, match="cannot be started: No such file"):
        encoded(2)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(PassingError, match=r"has died \(exit code 1\)"):
        encoded(2)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_tokenizer_that_gives_ids_outside_its_vocabulary_is_refused(num_workers):
    with pytest.raises(UserError, match=r"cannot be tokenised: the tokenizer gives the id 2\d\d, but has 280 tokens"):
        encoded(num_workers, replace(ENCODING, vocab_size=280))


def panicking():
    tokenizer = json.loads(ENCODING.tokenizer)
    tokenizer["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    return replace(ENCODING, tokenizer=json.dumps(tokenizer))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_tokenizer_that_panics_is_one_sentence(num_workers, monkeypatch, capfd):
    monkeypatch.setenv("RUST_BACKTRACE", "1")
    with pytest.raises(UserError, match=r"^The documents cannot be tokenised: chunk size must be non-zero\.$") as error:
        encoded(num_workers, panicking())
    assert not isinstance(error.value, PassingError)
    if num_workers > 1:
        assert "stack backtrace" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped(signal.SIGTERM), MemoryError])
def test_only_what_the_tokenizer_fails_at_is_taken_for_its_failure(monkeypatch, error):
    monkeypatch.setattr(workers.Encoder, "__call__", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        encoded(1)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("os.write(1, b'hello')", None),
        ("print('hello', flush=True)", None),
        (
            "pickle.dump = lambda answer, file, **_: (file.write(b'hello'), file.flush())",
            "no answer",
        ),
        ("def fail(*_, **__): raise MemoryError\nnumpy.array = fail", "has not enough memory; start again"),
        ("os.close(1); os.dup2(2, 1); time.sleep(60)", r"has died \(signal 9\)"),
    ],
)
def test_what_else_a_worker_says_is_neither_an_answer_nor_waited_for(monkeypatch, tmp_path, code, told):
    (tmp_path / "sitecustomize.py").write_text(f"import os, pickle, time, numpy\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "SECONDS_TO_END", 0.2)
    if told is None:
        assert encoded(2) == encoded(1)
    else:
        with pytest.raises(PassingError, match=told):
            encoded(2)


def test_the_default_number_of_workers_has_an_end(monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "own_cores", lambda: 192)
    monkeypatch.setattr(workers, "encode_in_workers", lambda batches, encoding, number: asked.append(number) or [])
    encoded(None)
    assert asked == [16]


def test_a_worker_computes_on_one_thread(monkeypatch, started):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    environments = []
    start = workers.subprocess.Popen

    def remember(*arguments, env, **options):
        environments.append(env)
        return start(*arguments, env=env, **options)

    monkeypatch.setattr("moxe.data.workers.subprocess.Popen", remember)
    encoded(2)
    assert {(env["OMP_NUM_THREADS"], env["OPENBLAS_NUM_THREADS"]) for env in environments} == {("1", "1")}


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_the_source_raises_ends_the_workers(started, error):
    def source():
        yield from batches()[:8]
        raise error("stop")

    with pytest.raises(error, match="stop"):
        encoded(2, given=source())
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_worker_imports_neither_torch_nor_transformers_nor_moxe():
    code = f"""
import runpy, sys
runpy.run_path({encoding_module.__file__!r})
print({{"torch", "transformers", "moxe", "datasets"}} & sys.modules.keys())
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_worker_ignores_an_interruption_and_ends_with_whoever_started_it():
    command = [sys.executable, "-P", encoding_module.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        pickle.dump(asdict(ENCODING), process.stdin)
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        assert process.stdout.readline() == encoding_module.READY
        for _ in range(2):
            pickle.dump(["The cat"], process.stdin)
            process.stdin.flush()
            ids, lengths = pickle.load(process.stdout)
            assert len(ids) == lengths[0]
            process.send_signal(signal.SIGINT)
        process.stdin.write(b"half a message")
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == b""


def test_workers_end_when_the_process_that_started_them_is_killed():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            results = encode_batches(batches(), ENCODING, 2)
            next(results)
            threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("moxe-encode")]
            os.write(writer, f"{len(threads)} {_children()}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # a child that fails must not go on with the tests
    os.close(writer)
    with os.fdopen(reader) as lines:
        threads, *pids = lines.readline().split()
    os.waitpid(child, 0)
    assert (threads, len(pids)) == ("2", 2)
    end = monotonic() + 20
    while any(_is_alive(pid) for pid in pids) and monotonic() < end:
        sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


def _children() -> str:
    children = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            children += file.read().split()
    return " ".join(children)


def _is_alive(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_batches_end_where_their_characters_are_enough(monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 5)
    documents = [("abc", 1), ("def", 2), ("ghijkl", 3), ("m", 4)]
    assert [(batch.texts, batch.end) for batch in text_batches(documents)] == [
        (["abc", "def"], 2),
        (["ghijkl"], 3),
        (["m"], 4),
    ]
