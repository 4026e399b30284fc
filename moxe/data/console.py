"""What a user is told while data are read: lines on the standard error output, and why a library failed."""

from rich.console import Console


def say(line: str) -> None:
    """One plain line: nothing in it is markup, and a file that it goes to gets it unbroken."""
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def reason(error: BaseException) -> str:
    """The first line of what an error says, for the end of a sentence that has its own full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
