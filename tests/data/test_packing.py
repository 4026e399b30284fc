import json
import pickle
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moxe.data import packing
from moxe.data.packing import Block, PackedDataset, PackedStream
from moxe.errors import UserError

PAD = 99


def documents_of(rows):
    """The documents that rows hold, cut where rows end, in the order of rows."""
    for row in rows:
        real = row["attention_mask"].bool()
        ids, owners = row["input_ids"][real], row["document_ids"][real]
        for owner in owners.unique():
            yield ids[owners == owner].tolist()


def test_a_row_says_where_documents_begin_and_what_is_padding(write_documents):
    rows = PackedDataset(write_documents([1, 2, 3], [4, 5], [6, 7, 8]), sequence_length=5, pad_token_id=PAD)
    assert len(rows) == 2
    assert {key: value.tolist() for key, value in rows[0].items()} == {
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [1, 2, 3, 4, 5],
        "document_ids": [0, 0, 0, 1, 1],
        "attention_mask": [1, 1, 1, 1, 1],
    }
    assert {key: value.tolist() for key, value in rows[1].items()} == {
        "input_ids": [6, 7, 8, PAD, PAD],
        "labels": [6, 7, 8, -100, -100],
        "document_ids": [0, 0, 0, 1, 1],
        "attention_mask": [1, 1, 1, 0, 0],
    }
    assert all(value.dtype == torch.int64 for value in rows[1].values())


def test_a_long_document_goes_on_in_the_next_rows(write_documents):
    rows = PackedDataset(write_documents([1], list(range(10, 19)), [2, 3]), sequence_length=4, pad_token_id=PAD)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 2, 3]]
    assert [row["document_ids"].tolist() for row in rows] == [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]


def test_the_order_of_documents_is_the_seeds(write_documents):
    documents = write_documents(*[[i, i] for i in range(20)])

    def order(seed):
        rows = PackedDataset(documents, sequence_length=4, pad_token_id=PAD, seed=seed)
        return [ids[0] for ids in documents_of(rows)]

    assert order(None) == list(range(20))
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == list(range(20))


def test_rows_beyond_the_end_do_not_exist(write_documents):
    rows = PackedDataset(write_documents([1, 2, 3]), sequence_length=2, pad_token_id=PAD)
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows[2]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(2, 9), st.one_of(st.none(), st.integers(0, 3)))
def test_every_token_is_in_exactly_one_row_in_order(write_documents, lengths, sequence_length, seed):
    starts = np.cumsum([0, *lengths])
    tokens = [list(range(start, end)) for start, end in pairwise(starts)]
    rows = PackedDataset(write_documents(*tokens), sequence_length=sequence_length, pad_token_id=PAD, seed=seed)
    pieces = list(documents_of(rows))
    # Pieces of one document follow each other; joined, they are the documents.
    whole = {ids[0]: ids for ids in tokens}
    position = 0
    flat = [token for piece in pieces for token in piece]
    while position < len(flat):
        document = whole.pop(flat[position])
        assert flat[position : position + len(document)] == document
        position += len(document)
    assert not whole
    assert all(len(row["input_ids"]) == sequence_length for row in rows)
    assert all(row["attention_mask"].all() for row in list(rows)[:-1])


def test_rows_survive_the_way_to_a_worker(write_documents):
    rows = PackedDataset(write_documents([1, 2, 3], [4, 5]), sequence_length=2, pad_token_id=PAD, seed=0)
    copy = pickle.loads(pickle.dumps(rows))
    assert [row["input_ids"].tolist() for row in copy] == [row["input_ids"].tolist() for row in rows]


def stream_of(*documents, sequence_length=4, block=3, opened=None):
    """A stream of documents in blocks; the ids of a pass are 100 above those of the one before."""
    starts = range(0, len(documents), block)

    def open_blocks(epoch, place):
        first = 0 if place is None else place["block"]
        for number in range(first, len(starts)):
            if opened is not None:
                opened.append((epoch, number))
            texts = documents[starts[number] : starts[number] + block]
            yield Block({"block": number}, (np.array(text) + 100 * epoch for text in texts))

    return PackedStream(open_blocks, sequence_length=sequence_length, pad_token_id=PAD)


def ids_of(rows):
    return [row["input_ids"].tolist() for row in rows]


def test_a_pass_over_a_stream_gives_the_rows_of_the_dataset(write_documents):
    documents = [[1], list(range(10, 19)), [2, 3], [4]]
    dataset = PackedDataset(write_documents(*documents), sequence_length=4, pad_token_id=PAD)
    for row, expected in zip(islice(stream_of(*documents), len(dataset)), dataset, strict=True):
        assert {key: value.tolist() for key, value in row.items()} == {
            key: value.tolist() for key, value in expected.items()
        }


def test_after_the_last_document_of_a_stream_the_next_pass_begins():
    assert ids_of(islice(stream_of([1, 2, 3], [4]), 3)) == [[1, 2, 3, 4], [101, 102, 103, 104], [201, 202, 203, 204]]
    assert ids_of(islice(stream_of([1, 2, 3]), 2)) == [[1, 2, 3, PAD], [101, 102, 103, PAD]]


def test_a_stream_without_text_is_refused():
    with pytest.raises(UserError, match="holds no text"):
        next(iter(stream_of([], [])))


def test_a_stream_is_not_read_by_workers():
    with pytest.raises(UserError, match="takes no workers"):
        next(iter(DataLoader(stream_of([1, 2, 3, 4]), batch_size=None, num_workers=1)))


# Documents shorter than a row, as long, longer, and none at all in a block.
DOCUMENTS = [[1], list(range(10, 21)), [2, 3], [4], [5] * 4, [6] * 3, [], [], [], [7], list(range(30, 39)), [8, 9]]
TOKENS = sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("sequence_length", [2, 3, 4, 7, 50])
def test_a_stream_goes_on_after_any_row_of_any_pass(sequence_length):
    length = 3 * -(-TOKENS // sequence_length)
    expected = ids_of(islice(stream_of(*DOCUMENTS, sequence_length=sequence_length), length))
    stream = stream_of(*DOCUMENTS, sequence_length=sequence_length)
    iterator = iter(stream)
    next(iterator)
    for rows in range(length - 1):
        state = json.loads(json.dumps(stream.state_at(rows)))
        assert state["rows"] == rows
        again = stream_of(*DOCUMENTS, sequence_length=sequence_length)
        again.resume(state)
        assert again.state_at(rows) == state
        resumed = list(islice(again, length))
        assert ids_of(resumed)[rows:] == expected[rows:]
        assert all(row["input_ids"].shape == (sequence_length,) for row in resumed)
        next(iterator)


def test_a_resumed_stream_can_be_resumed_again():
    expected = ids_of(islice(stream_of(*DOCUMENTS), 30))
    state = {"rows": 0, "epoch": 0, "block": None, "document": 0, "offset": 0}
    for rows in (3, 4, 9, 11, 20):
        stream = stream_of(*DOCUMENTS)
        stream.resume(state)
        assert ids_of(islice(stream, rows + 2))[state["rows"] :] == expected[state["rows"] : rows + 2]
        state = stream.state_at(rows)


def test_blocks_before_the_place_are_not_read_again():
    opened = []
    stream = stream_of(*DOCUMENTS)
    rows = ids_of(islice(stream, 8))
    state = stream.state_at(7)
    again = stream_of(*DOCUMENTS, opened=opened)
    again.resume(state)
    assert ids_of(islice(again, 8))[-1] == rows[-1]
    assert opened == [(0, 3)]


def test_a_place_that_is_not_reached_or_forgotten_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "RECENT_ROWS", 3)
    stream = stream_of(*DOCUMENTS)
    with pytest.raises(ValueError, match="after row 0 is not known; those known: none"):
        stream.state_at(0)
    iterator = iter(stream)
    for _ in range(5):
        next(iterator)
    assert stream.state_at(3)["rows"] == 3
    for rows in (2, 6):
        with pytest.raises(ValueError, match=f"after row {rows} is not known; those known: 3 to 5"):
            stream.state_at(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_trainers_loader_goes_on_with_the_very_rows_of_an_undisturbed_stream(batch_size):
    """As the Trainer does it: a prepared loader reads ahead, and a resumed one throws the first batches away."""

    def loader_of(stream):
        return Accelerator(cpu=True).prepare(DataLoader(stream, batch_size=batch_size, drop_last=False))

    def batches(loader, number):
        return [batch["input_ids"].tolist() for batch in islice(loader, number)]

    number = 25 // batch_size
    whole = batches(loader_of(stream_of(*DOCUMENTS)), number)
    for taken in range(1, number):
        stream = stream_of(*DOCUMENTS)
        assert batches(loader_of(stream), taken) == whole[:taken]
        state = stream.state_at(taken * batch_size)

        opened = []
        again = stream_of(*DOCUMENTS, opened=opened)
        again.resume(state)
        assert batches(skip_first_batches(loader_of(again), taken), number - taken) == whole[taken:]
        assert opened[0] == (state["epoch"], (state["block"] or {"block": 0})["block"])
