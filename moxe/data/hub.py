"""Data sets of the Hugging Face hub, streamed; a hub that does not answer is asked again."""

import errno
import http.client
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moxe.data.console import reason, say
from moxe.errors import PassingError, UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

# Before each further try; what `datasets` and huggingface_hub try by themselves comes before.
WAITS = (1, 2, 4, 8, 16)
# The first time that a name is asked for: it may be a mistyped path, of which the hub knows nothing.
FIRST_WAITS = WAITS[:1]

# What the libraries below `datasets` raise where a connection fails, by the package that defines it. By name, since
# which of them are installed depends on versions.
TRANSPORT_ERRORS = {
    "httpx": {"TransportError"},
    "httpx2": {"TransportError"},
    "httpcore": {"TimeoutException", "NetworkError", "ProtocolError"},
    "httpcore2": {"TimeoutException", "NetworkError", "ProtocolError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "urllib3": {"TimeoutError", "ProtocolError", "NewConnectionError", "MaxRetryError"},
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
}
NETWORK_ERRNOS = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN}
# HTTP 408 (the request came too slowly) and 429 (too many of them); the others below 500 are refusals.
BUSY_STATUSES = {408, 429}
# What huggingface_hub and `datasets` raise where the environment forbids to ask; a ConnectionError to Python.
OFFLINE = "OfflineModeIsEnabled"

# What `datasets` calls the place in a stream, JSON-able, and the number of rows before it.
HubPlace = dict[str, Any]

Answer = TypeVar("Answer")


def hub_revision(name: str, subset: str | None) -> str | None:
    """The revision of a data set that the hub gives now.

    Raises:
        UserError: if the hub has no such data set or subset.
        PassingError: if the hub does not answer.
    """
    return _Patience(name, is_known=False).ask(partial(_open_builder, name, subset, None)).hash


def hub_documents(
    name: str,
    subset: str | None,
    split: str,
    text_field: str,
    *,
    revision: str | None = None,
    shuffle_seed: Sequence[int] | None = None,
    place: HubPlace | None = None,
) -> Iterator[tuple[str, HubPlace]]:
    """The texts of a data set on the hub, each with the place after it; white space alone is left out.

    Args:
        name, subset, split: of the data set.
        text_field: the column that holds the text.
        revision: of the data set, which `hub_revision` gave; None: the one that the hub gives now. Either way it is
            the same to the end, since a place in one revision means nothing in another.
        shuffle_seed: of the order of its files, of which a few are read in turns; None: as they are.
        place: where to go on; None: the beginning. What is before it is not given again, though the files that were
            being read there are read up to it.

    Raises:
        UserError: at once, if there is no such data set, subset or split; later, if a row has no text in `text_field`
            or there is no text at all.
        PassingError: if the hub does not answer, however often it is asked, or fails after it has given rows.
    """
    place = place or {"stream": None, "rows": 0}
    if revision is None:
        revision = hub_revision(name, subset)
    patience = _Patience(name, rows=place["rows"])

    def open_at(state: dict[str, Any] | None) -> "IterableDataset":
        from datasets import IterableDataset

        stream = _open_builder(name, subset, revision).as_streaming_dataset(split=split)
        assert isinstance(stream, IterableDataset)  # a dictionary of them comes only without a split
        if shuffle_seed is not None:
            # Nothing but the order of the files: the contents of a larger buffer would not be part of the place.
            stream = stream.shuffle(generator=np.random.default_rng(shuffle_seed), buffer_size=1)
        if state is not None:
            logging.getLogger("datasets.iterable_dataset").addFilter(_is_not_about_the_buffer)
            stream.load_state_dict(state)
        return stream

    def texts(stream: "IterableDataset", place: HubPlace) -> Iterator[tuple[str, HubPlace]]:
        rows = iter(stream)
        any_text = place["rows"] > 0
        while True:
            try:
                row = next(rows)
                place = {"stream": stream.state_dict(), "rows": place["rows"] + 1}
                patience.rows = place["rows"]
            except StopIteration:
                break
            except Exception as error:
                patience.wait(error)
                stream = patience.ask(partial(open_at, place["stream"]))
                rows = iter(stream)
                continue
            patience.failures = 0
            if text_field not in row:
                columns = ", ".join(map(repr, row)) or "none"
                raise UserError(f"The data set {name!r} has no column {text_field!r}; its columns: {columns}.")
            where = f"Row {place['rows']} of the data set {name!r} has in column {text_field!r}"
            text = checked_text(row[text_field], where)
            if text.strip():
                any_text = True
                yield text, place
        if not any_text:
            raise UserError(f"The data set {name!r} holds no text.")

    return texts(patience.ask(partial(open_at, place["stream"])), place)


def checked_text(value: object, where: str) -> str:
    """The value, which must be text that UTF-8 can say; `where` begins the sentence of the error."""
    if not isinstance(value, str):
        raise UserError(f"{where} {'null' if value is None else f'a {type(value).__name__}'}, where text is expected.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair
        raise UserError(f"{where} an unpaired surrogate at character {error.start}, which is no text.") from error
    return value


def is_passing(error: BaseException | None) -> bool:
    """Whether another try may succeed: the error, or one that it comes from, is of the connection or of a server that
    is busy; and none says that the hub refuses, that it must not be asked or that it cannot be trusted."""
    passing = False
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = _status(error)
        if type(error).__name__ == OFFLINE or isinstance(error, ssl.SSLCertVerificationError):
            return False
        if status is not None and status < 500 and status not in BUSY_STATUSES:
            return False
        passing = passing or status is not None or _is_of_the_connection(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return passing


def _status(error: BaseException) -> int | None:
    """The status of HTTP from 400 on that an error carries, in the words of any of the libraries."""
    for value in (getattr(getattr(error, "response", None), "status_code", None), getattr(error, "status", None)):
        if isinstance(value, int) and value >= 400:
            return value
    return None


def _is_of_the_connection(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror | ssl.SSLError | http.client.HTTPException):
        return True
    if isinstance(error, OSError) and error.errno in NETWORK_ERRNOS:
        return True
    return any(kind.__name__ in TRANSPORT_ERRORS.get(kind.__module__.split(".")[0], ()) for kind in type(error).__mro__)


class _Patience:
    """How often the hub failed to answer in a row.

    Args:
        name: of the data set.
        is_known: whether the hub gave it before; if not, the name may be a mistyped path.
        rows: that the hub has given.
    """

    def __init__(self, name: str, *, is_known: bool = True, rows: int = 0) -> None:
        self.name = name
        self.is_known = is_known
        self.waits = WAITS if is_known else FIRST_WAITS
        self.rows = rows
        self.failures = 0

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer, after as many tries as are left."""
        while True:
            try:
                return question()
            except Exception as error:
                self.wait(error)

    def wait(self, error: Exception) -> None:
        """Waits for the next try; raises if there is none, or it would be no use."""
        if isinstance(error, MemoryError):
            raise error
        if not is_passing(error):
            raise self._refusal(error) from error
        if self.failures == len(self.waits):
            times = f"{len(self.waits) + 1} times in a row: {reason(error)}."
            if self.is_known:
                raise PassingError(f"The hub did not answer when it was asked for {self.name!r}, {times}") from error
            raise PassingError(
                f"There is no file or folder {self.name!r} here, and the hub did not answer when it was asked for a "
                f"data set of this name, {times}"
            ) from error
        seconds = self.waits[self.failures]
        self.failures += 1
        say(
            f"The hub did not answer ({reason(error)}); trying again in {seconds} s "
            f"({self.failures} of {len(self.waits)})."
        )
        sleep(seconds)

    def _refusal(self, error: Exception) -> UserError:
        if self.rows:
            # There is such a data set, and it could be read; what can fail now is too much to list.
            return PassingError(f"Reading {self.name!r} broke off after row {self.rows:,}: {reason(error)}.")
        if self.is_known and isinstance(error, OSError):
            return PassingError(f"The data set {self.name!r} could not be opened again: {reason(error)}.")
        # `datasets` raises its own, huggingface_hub's, httpx's, fsspec's and plain errors for what is one thing to a
        # user: this name, subset or split cannot be had; what the library says is the best there is to say why.
        return UserError(
            f"There is no file or folder {self.name!r} here, and it cannot be read as a data set of the Hugging Face "
            f"hub: {reason(error)}."
        )


def _open_builder(name: str, subset: str | None, revision: str | None) -> "DatasetBuilder":
    from datasets import load_dataset_builder

    return load_dataset_builder(name, subset, revision=revision)


def _is_not_about_the_buffer(record: logging.LogRecord) -> bool:
    """Drops the warning that the contents of a shuffle buffer are lost: ours is of one row, and empty."""
    return "shuffle buffer" not in record.getMessage()
