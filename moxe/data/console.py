"""Lines beside the result: what a user should know of while data are read, on the standard error output."""

from rich.console import Console


def say(line: str) -> None:
    """One plain line: nothing in it is markup, and a file that it goes to gets it unbroken."""
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
