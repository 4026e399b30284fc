import errno
import http.client
import json
import socket
import ssl

import datasets
import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moxe.data import hub as hub_module
from moxe.data.hub import hub_documents, is_passing
from moxe.data.sources import read_documents
from moxe.errors import PassingError, UserError
from tests.data.conftest import HUB_TEXTS


def http_error(status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub")
    return HfHubHTTPError(f"status {status}", response=httpx2.Response(status, request=request))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        socket.gaierror("no such name"),
        http.client.IncompleteRead(b""),
        httpx2.ReadTimeout("timed out"),
        httpx2.ConnectError("no route"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ssl.SSLError("bad record"),
        http_error(408),
        http_error(429),
        http_error(503),
        caused(RuntimeError("while reading"), httpx2.RemoteProtocolError("closed")),
        caused(FileNotFoundError("data set"), caused(OSError("below"), TimeoutError("timed out"))),
    ],
    ids=repr,
)
def test_what_may_pass_is_known(error):
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Bad split"),
        FileNotFoundError("no such data set"),
        http_error(404),
        http_error(403),
        OfflineModeIsEnabled("offline"),
        caused(ConnectionError("Couldn't reach the hub"), OfflineModeIsEnabled("offline")),
        caused(TimeoutError("gave up"), http_error(401)),
        OSError(errno.EMFILE, "Too many open files"),
        caused(httpx2.ConnectError("no trust"), ssl.SSLCertVerificationError("self-signed")),
    ],
    ids=repr,
)
def test_what_no_further_try_would_change_is_known(error):
    assert not is_passing(error)


def test_errors_that_refer_to_each_other_end():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not is_passing(first)


def texts(**options):
    return [text for text, _ in hub_documents("owner/name", None, "train", "text", **options)]


class Flaky:
    """Fails before the rows of these numbers, counted over all tries; each only once."""

    def __init__(self, monkeypatch, *failures, error=None):
        original = datasets.IterableDataset.__iter__
        self.left = list(failures)
        self.given = 0

        def iterate(stream):
            for row in original(stream):
                if self.left and self.left[0] == self.given:
                    self.left.pop(0)
                    raise error or TimeoutError("the read operation timed out")
                self.given += 1
                yield row

        monkeypatch.setattr("datasets.IterableDataset.__iter__", iterate)


@pytest.mark.parametrize("shuffle_seed", [None, [1, 2]])
@pytest.mark.parametrize("failures", [(0,), (3,), (1, 1, 1, 5, 7), (2, 2, 2, 2, 2, 4, 4, 4, 4, 4)])
def test_no_document_is_lost_or_doubled_where_reading_fails(hub, monkeypatch, waits, failures, shuffle_seed):
    expected = texts(shuffle_seed=shuffle_seed)
    assert sorted(expected) == sorted(HUB_TEXTS)
    flaky = Flaky(monkeypatch, *failures)
    assert texts(shuffle_seed=shuffle_seed) == expected
    assert not flaky.left
    assert len(waits) == len(failures)


def test_waits_grow_until_a_row_comes(hub, monkeypatch, waits, capsys):
    Flaky(monkeypatch, 2, 2, 2, 4)
    texts()
    assert waits == [1, 2, 4, 1]
    assert capsys.readouterr().err.splitlines()[2] == (
        "The hub did not answer (the read operation timed out); trying again in 4 s (3 of 5)."
    )


def test_a_hub_that_stops_answering_is_an_error_in_the_end(hub, monkeypatch, waits):
    Flaky(monkeypatch, *[1] * 6)
    documents = read_documents("owner/name", text_field="text", document_separator="")
    assert next(documents) == HUB_TEXTS[0]
    with pytest.raises(PassingError, match=r"asked for 'owner/name', 6 times in a row: the read .* timed out\.$"):
        next(documents)
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("error", [ConnectionError("no network"), http_error(502)])
def test_a_hub_that_never_answers_is_an_error_in_the_end(monkeypatch, waits, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    # The name may be a mistyped path, so there are few tries, and the path is the first thing to be told.
    told = r"^There is no file or folder 'owner/name' here, and the hub did not answer .*, 2 times in a row: "
    with pytest.raises(PassingError, match=told + str(error)):
        texts()
    assert waits == [1]


def test_a_hub_that_answers_late_is_read(hub, monkeypatch, waits):
    load = datasets.load_dataset_builder
    failures = [None, TimeoutError("late"), http_error(429), None, http_error(408)]

    def open_late(*arguments, **options):
        if failures and (failure := failures.pop()):
            raise failure
        return load(*arguments, **options)

    monkeypatch.setattr("datasets.load_dataset_builder", open_late)
    assert texts() == HUB_TEXTS
    assert waits == [1, 1, 2]


def test_a_refusal_is_not_tried_again(monkeypatch, waits):
    def refuse(*_, **__):
        raise http_error(403)

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    told = "cannot be read as a data set of the Hugging Face hub: status 403"
    with pytest.raises(UserError, match=told) as error:
        texts()
    assert not isinstance(error.value, PassingError)
    assert not waits


@pytest.mark.parametrize(
    "error", [http_error(403), OSError(errno.EMFILE, "Too many open files"), RuntimeError("a bug"), ValueError("bad")]
)
def test_whatever_fails_after_rows_were_given_may_pass(hub, monkeypatch, waits, error):
    Flaky(monkeypatch, 2, error=error)
    documents = hub_documents("owner/name", None, "train", "text")
    _, place = [next(documents) for _ in range(2)][-1]
    with pytest.raises(PassingError, match=r"^Reading 'owner/name' broke off after row 2: "):
        next(documents)
    assert not waits
    assert texts(place=place) == HUB_TEXTS[2:]
    Flaky(monkeypatch, 0, error=error)
    with pytest.raises(PassingError, match=r"^Reading 'owner/name' broke off after row 2: "):
        texts(place=place)


def test_a_data_set_that_was_there_before_is_not_refused_for_a_disk(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "_open_builder", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "full")))
    with pytest.raises(PassingError, match=r"'owner/name' could not be opened again: .*full"):
        texts(revision="known")


def test_a_lack_of_memory_is_told_as_such(hub, monkeypatch):
    Flaky(monkeypatch, 1, error=MemoryError())
    with pytest.raises(MemoryError):
        texts()


def test_the_revision_is_that_of_the_first_answer_to_the_end(hub, asked_revisions, monkeypatch, waits):
    Flaky(monkeypatch, 1, 3)
    assert texts() == HUB_TEXTS
    assert asked_revisions == [None, *["revision 1"] * 3]
    asked_revisions.clear()
    assert texts(revision="given") == HUB_TEXTS
    assert asked_revisions == ["given"]


def test_reading_fails_and_opening_fails_count_together(hub, monkeypatch, waits):
    Flaky(monkeypatch, 1)
    documents = hub_documents("owner/name", None, "train", "text")
    next(documents)
    monkeypatch.setattr(hub_module, "_open_builder", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
    with pytest.raises(PassingError, match="gone"):
        next(documents)
    assert waits == [1, 2, 4, 8, 16]


def test_an_interruption_is_not_taken_for_a_failure(hub, monkeypatch, waits):
    Flaky(monkeypatch, 1, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        texts()
    assert not waits


@pytest.mark.parametrize("shuffle_seed", [None, [0, 0], [0, 1]])
def test_reading_goes_on_from_any_place_without_a_word(hub, shuffle_seed, capsys, caplog):
    read = list(hub_documents("owner/name", None, "train", "text", shuffle_seed=shuffle_seed))
    for number, (_, place) in enumerate(read, start=1):
        place = json.loads(json.dumps(place))
        assert texts(shuffle_seed=shuffle_seed, place=place) == [text for text, _ in read[number:]]
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_the_seed_decides_the_order_of_files(hub):
    orders = {tuple(texts(shuffle_seed=[seed, 0])) for seed in range(8)}
    assert len(orders) > 1
    assert texts(shuffle_seed=[1, 0]) == texts(shuffle_seed=[1, 0])
