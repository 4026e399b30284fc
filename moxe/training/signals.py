"""SIGINT, SIGTERM and SIGHUP end a run in order: at once where nothing can be lost, else after the step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from moxe.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class StopSignals:
    """Which signal has asked for the end, and whether it may interrupt what is going on.

    Outside `deferred` the first signal raises Stopped where the program stands. Inside it is remembered in `received`,
    for whoever takes the steps to look at; a second one raises Stopped.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler of each signal."""
        if self._is_deferred and self.received is None:
            self.received = signum
            note = "finishing this step and saving; a second signal stops at once"
            with suppress(OSError):  # the terminal that was closed
                os.write(2, f"\nmoxe: {signal.Signals(signum).name}: {note}\n".encode())
            return
        raise Stopped(signum)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a first signal does not interrupt; it raises Stopped at the end, once everything is in order."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received is not None:
            raise Stopped(self.received)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handles the signals within; what was there before comes back.

    A signal that is ignored, as `nohup` ignores SIGHUP, stays ignored. Only the main thread can have handlers; in
    another the signals keep their meaning.
    """
    signals = StopSignals()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    handled = [signum for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for signum in handled:
            signal.signal(signum, signals.handle)
        yield signals
    finally:
        for signum in handled:
            signal.signal(signum, before[signum])
