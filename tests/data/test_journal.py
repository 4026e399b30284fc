import json

import numpy as np
import pytest

from moxe.data import journal as journal_module
from moxe.data.journal import JOURNAL, LENGTHS, TokenJournal
from moxe.data.tokens import TokenDocuments
from moxe.errors import PassingError


def append(journal, *documents, place):
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    journal.append((tokens, np.array([len(document) for document in documents], dtype=np.int64)), place)


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A folder whose journal counts two documents, with more in the files than that."""
    monkeypatch.setattr(journal_module, "SECONDS_BETWEEN_ENTRIES", 3600)
    with TokenJournal(tmp_path / "train", 100) as journal:
        append(journal, [1, 2, 3], [4], place={"row": 2})
        journal.enter()
        append(journal, [5, 6], place={"row": 3})
    return tmp_path / "train"


def test_what_the_journal_does_not_count_is_made_again(unfinished):
    with TokenJournal(unfinished, 100) as journal:
        assert (journal.place, journal.num_documents, journal.num_tokens) == ({"row": 2}, 2, 4)
        append(journal, [7, 8, 9], place={"row": 3})
        journal.finish()
    assert [ids.tolist() for ids in TokenDocuments(unfinished)] == [[1, 2, 3], [4], [7, 8, 9]]


def test_entries_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SECONDS_BETWEEN_ENTRIES", 0)
    for number in range(4):
        with TokenJournal(tmp_path, 100) as journal:
            assert (journal.place, journal.num_documents) == (number or None, 2 * number)
            append(journal, [number], [number] * 3, place=number + 1)
    with TokenJournal(tmp_path, 100) as journal:
        journal.finish()
    assert [ids.tolist() for ids in TokenDocuments(tmp_path)] == [[n] * size for n in range(4) for size in (1, 3)]


def test_a_finished_folder_is_finished_again_alike(unfinished):
    for _ in range(2):
        with TokenJournal(unfinished, 100) as journal:
            journal.finish()
        assert [ids.tolist() for ids in TokenDocuments(unfinished)] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("name", ["tokens.bin", LENGTHS])
@pytest.mark.parametrize("change", [lambda content: content + b"12", lambda content: b"1" + content[1:]])
def test_what_another_process_wrote_is_not_vouched_for(tmp_path, name, change):
    with TokenJournal(tmp_path, 100) as journal:
        append(journal, [1, 2, 3], [4], place=2)
        journal.enter()
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
        with pytest.raises(PassingError, match=f"{name} is not what was written to it"):
            journal.finish()


def damage(folder, kind):
    tokens = (folder / "tokens.bin").read_bytes()
    journal = json.loads((folder / JOURNAL).read_text())
    if kind == "flipped":
        (folder / "tokens.bin").write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
    elif kind == "short":
        (folder / "tokens.bin").write_bytes(tokens[:7])
    elif kind == "no lengths":
        (folder / LENGTHS).unlink()
    elif kind == "no journal":
        (folder / JOURNAL).unlink()
    elif kind == "half a journal":
        (folder / JOURNAL).write_text((folder / JOURNAL).read_text()[:-9])
    elif kind == "another journal":
        (folder / JOURNAL).write_text("[]")
    else:
        del journal["place"]
        (folder / JOURNAL).write_text(json.dumps(journal))


@pytest.mark.parametrize(
    "kind", ["flipped", "short", "no lengths", "no journal", "half a journal", "another journal", "no place"]
)
def test_files_that_are_not_what_the_journal_says_are_begun_anew(unfinished, kind):
    damage(unfinished, kind)
    with TokenJournal(unfinished, 100) as journal:
        assert (journal.place, journal.num_documents, journal.num_tokens) == (None, 0, 0)
        append(journal, [9], place=1)
        journal.finish()
    assert [ids.tolist() for ids in TokenDocuments(unfinished)] == [[9]]
