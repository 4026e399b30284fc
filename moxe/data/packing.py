"""Packing: documents laid end to end and cut into rows of equal length, nothing dropped.

A row is a dictionary of int64 tensors [S], S the sequence length:
    input_ids       token ids; padding at the end of the last row alone
    labels          input_ids, and -100 on padding (the model shifts them, and predicts no token across documents)
    document_ids    0, 1, 2, … along the row: a change of value starts a document; padding counts as one more
    attention_mask  1, and 0 on padding
A document that does not fit goes on in the next row, where its state starts anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from moxe.data.tokens import TokenDocuments, Tokens

Row = dict[str, torch.Tensor]


class PackedDataset(Dataset[Row]):
    """Rows of tokenised documents, which are taken in an order shuffled by `seed` (None: in their own order).

    Args:
        documents: the documents; read from disk row by row.
        sequence_length: tokens a row, S.
        pad_token_id: fills the last row.
        seed: of the order of the documents.
    """

    def __init__(
        self, documents: TokenDocuments, *, sequence_length: int, pad_token_id: int, seed: int | None = None
    ) -> None:
        self.documents = documents
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        count = len(documents)
        self._order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        # Where each document, in this order, ends in the stream of all tokens.
        self._ends = np.cumsum(np.diff(documents.offsets)[self._order])

    def __len__(self) -> int:
        """Rows: all tokens divided by the sequence length, rounded up."""
        return -(-self.documents.num_tokens // self.sequence_length)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        position = index * self.sequence_length
        end = min(position + self.sequence_length, self.documents.num_tokens)
        pieces = []
        place = int(np.searchsorted(self._ends, position, side="right"))
        while position < end:
            document = self.documents[int(self._order[place])]
            start = position - (int(self._ends[place]) - len(document))
            piece = document[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
            place += 1
        return _row(pieces, self.sequence_length, self.pad_token_id)


class PackedStream(IterableDataset[Row]):
    """Rows of documents that are read as they are needed, such as a data set streamed from the hub.

    Each worker process of a DataLoader takes its share of the documents, every n-th one.

    Args:
        open_documents: gives the documents of a pass over the data, from the number of the pass, as token ids.
        sequence_length, pad_token_id: as in PackedDataset.
    """

    def __init__(
        self, open_documents: Callable[[int], Iterable[Tokens]], *, sequence_length: int, pad_token_id: int
    ) -> None:
        self.open_documents = open_documents
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the data the next iteration is; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        pieces: list[Tokens] = []
        room = self.sequence_length
        for number, document in enumerate(self.open_documents(self.epoch)):
            if number % share[1] != share[0]:
                continue
            while len(document) > 0:
                pieces.append(document[:room])
                document = document[room:]
                room -= len(pieces[-1])
                if room == 0:
                    yield _row(pieces, self.sequence_length, self.pad_token_id)
                    pieces, room = [], self.sequence_length
        if pieces:
            yield _row(pieces, self.sequence_length, self.pad_token_id)


def _row(pieces: Sequence[Tokens], sequence_length: int, pad_token_id: int) -> Row:
    """Pieces of documents, together at most one row, as tensors; the rest is padding."""
    tokens = np.concatenate(pieces).astype(np.int64)
    padding = sequence_length - len(tokens)
    lengths = [len(piece) for piece in pieces] + [padding]
    return {
        "input_ids": torch.from_numpy(np.pad(tokens, (0, padding), constant_values=pad_token_id)),
        "labels": torch.from_numpy(np.pad(tokens, (0, padding), constant_values=-100)),
        "document_ids": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        "attention_mask": torch.from_numpy((np.arange(sequence_length) < len(tokens)).astype(np.int64)),
    }
