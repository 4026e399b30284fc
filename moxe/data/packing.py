"""Packing: documents laid end to end and cut into rows of equal length, nothing dropped.

A row is a dictionary of int64 tensors [S], S the sequence length:
    input_ids       token ids; padding at the end of the last row alone
    labels          input_ids, and -100 on padding (the model shifts them, and predicts no token across documents)
    document_ids    0, 1, 2, … along the row: a change of value starts a document; padding counts as one more
    attention_mask  1, and 0 on padding
A document that does not fit goes on in the next row, where its state starts anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice, repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from moxe.data.encoding import Tokens
from moxe.data.tokens import TokenDocuments
from moxe.errors import UserError

# Rows whose places a stream remembers; whoever trains reads a few batches ahead of the step.
RECENT_ROWS = 2**14

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
        size = len(documents)
        self._order = np.arange(size) if seed is None else np.random.default_rng(seed).permutation(size)
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


@dataclass(frozen=True)
class Block:
    """Documents of a stream that are shuffled together.

    Args:
        place: opens the stream at this block again; JSON can say it. None: the first block.
        documents: as token ids, in the order of the stream.
    """

    place: dict[str, Any] | None
    documents: Iterable[Tokens]


class PackedStream(IterableDataset[Row]):
    """Rows without end of documents that are read as they are needed, such as a data set streamed from the hub.

    After the last document, and a row that padding fills, the next pass over the data begins. The rows can be gone on
    with in another process: `state_at` there, `resume` here.

    Args:
        open_blocks: gives the blocks of a pass over the data, from the number of the pass and the place of the block
            to begin with (None: the first).
        sequence_length, pad_token_id: as in PackedDataset.
    """

    def __init__(
        self,
        open_blocks: Callable[[int, dict[str, Any] | None], Iterable[Block]],
        *,
        sequence_length: int,
        pad_token_id: int,
    ) -> None:
        self.open_blocks = open_blocks
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        self._start = (0, _StreamPlace())  # rows that come before it, without text
        # Number of rows -> where the next one begins.
        self._places: dict[int, _StreamPlace] = {}

    def state_at(self, rows: int) -> dict[str, Any]:
        """Where the row after the first `rows` rows begins; JSON can say it.

        Rows may have been read ahead of the one that is asked about, RECENT_ROWS at most.

        Raises:
            ValueError: if so many rows were not read yet, or more than RECENT_ROWS were read since.
        """
        if rows not in self._places:
            known = f"{min(self._places)} to {max(self._places)}" if self._places else "none"
            raise ValueError(f"the place after row {rows} is not known; those known: {known}")
        return {"rows": rows, **asdict(self._places[rows])}

    def resume(self, state: dict[str, Any]) -> None:
        """Iterations go on from there; their first `state["rows"]` rows are one row over and over, without any text,
        for the Trainer to skip.

        Args:
            state: from `state_at`, of a stream of the same documents, sequence length and seed.
        """
        place = {key: value for key, value in state.items() if key != "rows"}
        self._start = (state["rows"], _StreamPlace(**place))
        self._places = dict([self._start])

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            raise UserError("A stream is read in the process that trains: its DataLoader takes no workers.")
        return self._rows(*self._start)

    def _rows(self, rows: int, place: "_StreamPlace") -> Iterator[Row]:
        if rows:
            without_text = [np.full(self.sequence_length, self.pad_token_id)]
            yield from repeat(_row(without_text, self.sequence_length, self.pad_token_id), rows)
        self._places = {rows: place}
        for number in count(place.epoch):
            rows_before = rows
            for row, after in self._pass_from(place):
                rows += 1
                self._remember(rows, after)
                yield row
            if rows == rows_before and place == _StreamPlace(epoch=number):
                raise UserError("The stream holds no text: a pass over its data gave no row.")
            place = _StreamPlace(epoch=number + 1)

    def _pass_from(self, place: "_StreamPlace") -> Iterator[tuple[Row, "_StreamPlace"]]:
        """The rows that are left of a pass, each with the place after it."""
        epoch, first_document, offset = place.epoch, place.document, place.offset
        pieces: list[Tokens] = []
        room = self.sequence_length
        for block in self.open_blocks(epoch, place.block):
            for number, document in islice(enumerate(block.documents), first_document, None):
                while offset < len(document):
                    pieces.append(document[offset : offset + room])
                    offset += len(pieces[-1])
                    room -= len(pieces[-1])
                    if room == 0:
                        row = _row(pieces, self.sequence_length, self.pad_token_id)
                        pieces, room = [], self.sequence_length
                        yield row, _StreamPlace(epoch, block.place, number, offset)
                offset = 0
            first_document = offset = 0
        if pieces:
            yield _row(pieces, self.sequence_length, self.pad_token_id), _StreamPlace(epoch + 1)

    def _remember(self, rows: int, place: "_StreamPlace") -> None:
        self._places[rows] = place
        if len(self._places) > RECENT_ROWS:
            del self._places[next(iter(self._places))]


@dataclass(frozen=True)
class _StreamPlace:
    """A place in a stream: number of the pass, place of the block, document in the block, token in the document."""

    epoch: int = 0
    block: dict[str, Any] | None = None
    document: int = 0
    offset: int = 0


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
