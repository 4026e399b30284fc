"""What ends a command in one sentence instead of a traceback."""

import signal


class UserError(ValueError):
    """Bad input, told in one clear sentence; the command line prints it without a traceback and exits with code 2."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal and has left everything in order; the exit code is 128 plus the signal.

    Args:
        signum: the signal, such as `signal.SIGTERM`.
        consequence: what has been saved and how to go on.
    """

    def __init__(self, signum: int, consequence: str = "") -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name}" + (f"; {consequence}" if consequence else ""))
