"""Batches of documents encoded in worker processes; what comes out is the same, in the same order, as without them."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, islice
from queue import SimpleQueue
from typing import IO, Any, Protocol, TypeVar

from moxe.data import encoding as encoding_module
from moxe.data.console import reason
from moxe.data.encoding import READY, Encoded, Encoder, Encoding, is_failure_of_a_library
from moxe.errors import PassingError, UserError

# Starting processes takes longer than so few batches.
BATCHES_WITHOUT_WORKERS = 4
# Batches read ahead for each worker, so that none waits for the reader.
BATCHES_A_WORKER = 2
# Where the recipe does not say how many; the one process that reads and writes keeps no more of them busy.
MOST_WORKERS_UNASKED = 16
# Of a worker. It encodes one batch after the other, on one thread, and the stack of a panic helps nobody.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}
# For a worker whose pipes are closed.
SECONDS_TO_END = 10
START_AGAIN = "start again to go on from there, with a smaller data.num_workers if memory was short."


class HasTexts(Protocol):
    @property
    def texts(self) -> Sequence[str]: ...


Batch = TypeVar("Batch", bound=HasTexts)


def own_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_batches(
    batches: Iterable[Batch], encoding: Encoding, num_workers: int | None
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Each batch with its tokens, in the order of the batches.

    Args:
        batches: read as they are needed, a few ahead.
        encoding: how.
        num_workers: processes that encode; 1: this one, on the threads of the tokenizers library; None: as many as
            this process has cores, and MOST_WORKERS_UNASKED at most. Few batches are encoded in this process in any
            case.

    Raises:
        UserError: if the tokenizer fails.
        PassingError: if a worker cannot be started, dies or has not enough memory.
    """
    if num_workers is None:
        num_workers = min(own_cores(), MOST_WORKERS_UNASKED)
    batches = iter(batches)
    if num_workers > 1:
        first = list(islice(batches, BATCHES_WITHOUT_WORKERS))
        few = len(first) < BATCHES_WITHOUT_WORKERS
        batches = chain(first, batches)
        if not few:
            yield from encode_in_workers(batches, encoding, num_workers)
            return
    encoder = Encoder(encoding)
    for batch in batches:
        try:
            encoded = encoder(batch.texts)
        except BaseException as error:  # tokenizers raises plain Exception
            if isinstance(error, MemoryError) or not is_failure_of_a_library(error):
                raise
            raise _failed(error) from error
        yield batch, encoded


def encode_in_workers(
    batches: Iterable[Batch], encoding: Encoding, num_workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """As `encode_batches`, in `num_workers` processes however few batches there are."""
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def encode(texts: Sequence[str]) -> Encoded:
        worker = idle.get()  # there are as many workers as threads
        try:
            return worker.encode(texts)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="moxe-encode")
    try:
        for _ in range(num_workers):
            workers.append(_Worker(encoding))
            idle.put(workers[-1])
        under_way: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            under_way.append((batch, threads.submit(encode, batch.texts)))
            if len(under_way) >= num_workers * BATCHES_A_WORKER:
                yield _result(under_way)
        while under_way:
            yield _result(under_way)
    finally:
        # However this ends: a thread that waits for its worker's answer is told by the closed pipe.
        for worker in workers:
            worker.process.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.close()


def _failed(error: BaseException) -> UserError:
    return UserError(f"The documents cannot be tokenised: {reason(error)}.")


def _result(under_way: "deque[tuple[Batch, Future[Encoded]]]") -> tuple[Batch, Encoded]:
    batch, future = under_way.popleft()
    return batch, future.result()


class _Worker:
    """A process that encodes one batch at a time."""

    def __init__(self, encoding: Encoding) -> None:
        # By the path of the file: as a module of moxe it would import torch, and multiprocessing would import the
        # program that runs here. In a process group of its own, so that a terminal's Ctrl-C does not reach it.
        command = [sys.executable, "-P", encoding_module.__file__]
        environment = {**os.environ, **ENVIRONMENT}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
            )
        except OSError as error:
            raise PassingError(f"A process to tokenise in cannot be started: {error.strerror or error}.") from error
        self.first_message: dict[str, Any] | None = asdict(encoding)

    def encode(self, texts: Sequence[str]) -> Encoded:
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if self.first_message is not None:
                pickle.dump(self.first_message, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                self.first_message = None
                _skip_to_answers(process.stdout)
            pickle.dump(texts, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError):
            raise PassingError(f"A process that tokenises has died ({self._ending()}); {START_AGAIN}") from None
        except Exception as error:  # pickle raises whatever the bytes lead it to
            process.kill()  # it may be waiting for more
            raise PassingError(
                f"A process that tokenises gave no answer that can be read ({reason(error)}); {START_AGAIN}"
            ) from None
        if isinstance(answer, MemoryError):
            raise PassingError(f"A process that tokenises has not enough memory; {START_AGAIN}")
        if isinstance(answer, Exception):
            raise _failed(answer)
        return answer

    def _ending(self) -> str:
        """How the process ended; killed if it goes on without its pipes."""
        try:
            code = self.process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        process = self.process
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was still to be sent to a process that is gone
                pipe.close()


def _skip_to_answers(output: IO[bytes]) -> None:
    """Past what the start of Python may print, such as a sitecustomize's greeting."""
    for line in output:
        if line == READY:
            return
    raise EOFError
