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


def test_a_stream_gives_the_rows_of_the_dataset(write_documents):
    documents = [[1], list(range(10, 19)), [2, 3], [4]]
    dataset = PackedDataset(write_documents(*documents), sequence_length=4, pad_token_id=PAD)
    rows = list(stream_of(*documents))
    assert len(rows) == len(dataset)
    for row, expected in zip(rows, dataset, strict=True):
        assert {key: value.tolist() for key, value in row.items()} == {
            key: value.tolist() for key, value in expected.items()
        }


def test_a_stream_that_fills_its_rows_has_no_row_of_padding():
    assert [row["input_ids"].tolist() for row in stream_of([1, 2, 3], [4])] == [[1, 2, 3, 4]]


def test_a_stream_begins_anew_each_epoch():
    stream = stream_of([1, 2, 3, 4])
    assert [row["input_ids"].tolist() for row in stream] == [[1, 2, 3, 4]]
    stream.set_epoch(1)
    assert [row["input_ids"].tolist() for row in stream] == [[101, 102, 103, 104]]


def test_a_stream_is_not_read_by_workers():
    with pytest.raises(UserError, match="takes no workers"):
        next(iter(DataLoader(stream_of([1, 2, 3, 4]), batch_size=None, num_workers=1)))


# Documents shorter than a row, as long, longer, and none at all in a block.
DOCUMENTS = [[1], list(range(10, 21)), [2, 3], [4], [5] * 4, [6] * 3, [], [], [], [7], list(range(30, 39)), [8, 9]]


def ids_of(rows):
    return [row["input_ids"].tolist() for row in rows]


@pytest.mark.parametrize("sequence_length", [2, 3, 4, 7, 50])
def test_a_stream_goes_on_after_any_row(sequence_length):
    stream = stream_of(*DOCUMENTS, sequence_length=sequence_length)
    expected = ids_of(stream)
    iterator = iter(stream)
    for rows in range(len(expected) + 1):
        state = json.loads(json.dumps(stream.state_at(rows)))
        assert (state["epoch"], state["rows"]) == (0, rows)
        again = stream_of(*DOCUMENTS, sequence_length=sequence_length)
        again.resume(state)
        assert again.state_at(rows) == state
        resumed = list(again)
        assert ids_of(resumed)[rows:] == expected[rows:]
        assert all(row["input_ids"].shape == (sequence_length,) for row in resumed)
        next(iterator, None)


def test_a_resumed_stream_is_as_long_and_the_next_pass_is_whole():
    stream = stream_of(*DOCUMENTS)
    rows = ids_of(stream)
    stream.resume(stream.state_at(5))
    assert len(list(stream)) == len(rows)
    assert ids_of(stream) == rows
    stream.set_epoch(1)
    assert len(ids_of(stream)) == len(rows)


def test_a_resumed_pass_leaves_the_others_alone():
    stream = stream_of(*DOCUMENTS)
    stream.set_epoch(1)
    expected = ids_of(stream)
    state = stream.state_at(4)
    again = stream_of(*DOCUMENTS)
    again.resume(state)
    assert ids_of(again) == ids_of(stream_of(*DOCUMENTS))
    again.set_epoch(1)
    assert ids_of(again)[4:] == expected[4:]


def test_blocks_before_the_place_are_not_read_again():
    stream = stream_of(*DOCUMENTS)
    rows = ids_of(stream)
    state = stream.state_at(len(rows) - 1)
    opened = []
    again = stream_of(*DOCUMENTS, opened=opened)
    again.resume(state)
    assert ids_of(again)[-1] == rows[-1]
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
def test_the_trainers_loader_goes_on_with_the_very_rows_of_an_undisturbed_pass(batch_size):
    """As the Trainer does it: a prepared loader reads ahead, and a resumed one throws the first batches away."""

    def loader_of(stream):
        return Accelerator(cpu=True).prepare(DataLoader(stream, batch_size=batch_size, drop_last=False))

    def batches(loader, epoch):
        loader.set_epoch(epoch)
        return (batch["input_ids"].tolist() for batch in loader)

    whole = {epoch: list(batches(loader_of(stream_of(*DOCUMENTS)), epoch)) for epoch in (0, 1, 2)}
    for epoch in (0, 1):
        for taken in range(1, len(whole[epoch])):
            stream = stream_of(*DOCUMENTS)
            reading = batches(loader_of(stream), epoch)
            assert list(islice(reading, taken)) == whole[epoch][:taken]
            state = stream.state_at(taken * batch_size)

            opened = []
            again = stream_of(*DOCUMENTS, opened=opened)
            again.resume(state)
            loader = loader_of(again)
            assert list(batches(skip_first_batches(loader, taken), epoch)) == whole[epoch][taken:]
            assert opened[0] == (epoch, (state["block"] or {"block": 0})["block"])
            assert list(batches(loader, epoch + 1)) == whole[epoch + 1]


def test_the_position_of_a_row_is_that_of_its_first_token(write_documents):
    documents = write_documents([1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12])
    rows = PackedDataset(documents, sequence_length=4, pad_token_id=PAD, seed=1)
    order = rows._order
    for number in range(len(rows)):
        position = rows.position(number)
        document = documents[int(order[position["document"]])]
        assert document[position["offset"]] == rows[number]["input_ids"][0]
    assert rows.position(3) == {"document": 4, "offset": 0}
    with pytest.raises(IndexError, match="row 4 of 3"):
        rows.position(4)
