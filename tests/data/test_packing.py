import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moxe.data.packing import PackedDataset, PackedStream

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


def stream_of(*documents, sequence_length=4):
    def open_documents(epoch):
        return [np.array(document) + 10 * epoch for document in documents]

    return PackedStream(open_documents, sequence_length=sequence_length, pad_token_id=PAD)


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
    assert [row["input_ids"].tolist() for row in stream] == [[11, 12, 13, 14]]


def test_workers_share_the_documents_of_a_stream():
    stream = stream_of(*[[i] * 4 for i in range(6)])
    rows = [row["input_ids"][0].tolist() for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(ids for ids in rows) == [0, 1, 2, 3, 4, 5]
