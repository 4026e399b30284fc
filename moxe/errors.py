"""What ends a command in one sentence instead of a traceback, and how what is printed shows a value or a name."""

from __future__ import annotations

import reprlib
import signal

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


class UserError(ValueError):
    """Bad input, told in one clear sentence; the command line prints it without a traceback and exits with code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.split()))  # a path or a library's message may break the line


class PassingError(UserError):
    """Nothing is wrong with the input: a disk, a network or a process failed, and another try may go on from there."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal and has left everything in order; the exit code is 128 plus the signal.

    Args:
        signum: the signal, such as `signal.SIGTERM`.
        consequence: what has been saved and how to go on.
    """

    def __init__(self, signum: int, consequence: str = "") -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name}" + (f"; {consequence}" if consequence else ""))


def shown(value: object) -> str:
    """`repr`, cut short: what YAML's aliases repeat can be longer than memory, and an integer has no digit limit."""
    if isinstance(value, int) and abs(value) >= 2**128:
        return f"a number of {value.bit_length()} bits"
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """The text with what would break the line, move the cursor or colour the terminal escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
