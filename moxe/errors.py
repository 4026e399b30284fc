"""The one exception that a user's input can cause."""


class UserError(ValueError):
    """Bad input, told in one clear sentence; the command line prints it without a traceback and exits with code 2."""
