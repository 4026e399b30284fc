"""Packing: documents laid end to end and cut into rows of equal length, nothing dropped.

A row is a dictionary of int64 tensors [S], S the sequence length:
    input_ids       token ids; padding at the end of the last row alone
    labels          input_ids, and -100 on padding (the model shifts them, and predicts no token across documents)
    document_ids    0, 1, 2, … along the row: a change of value starts a document; padding counts as one more
    attention_mask  1, and 0 on padding
A document that does not fit goes on in the next row, where its state starts anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
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

    def position(self, rows: int) -> dict[str, int]:
        """Where row `rows` begins: the `document`, counted in the shuffled order, and the token `offset` in it.

        Raises:
            IndexError: if there are not so many rows.
        """
        if not 0 <= rows <= len(self):
            raise IndexError(f"row {rows} of {len(self)}")
        token = min(rows * self.sequence_length, self.documents.num_tokens)
        document = int(np.searchsorted(self._ends, token, side="right"))
        return {"document": document, "offset": token - (int(self._ends[document - 1]) if document else 0)}


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
    """Rows of documents that are read as they are needed, such as a data set streamed from the hub.

    A pass can be left after any row and gone on with in another process: `state_at` there, `resume` here.

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
        self.epoch = 0
        self._resumed: dict[str, Any] | None = None
        # Of the pass under way: number of rows -> block's place, document in the block, token in the document.
        self._marks: dict[int, tuple[dict[str, Any] | None, int, int]] = {}
        self._marked_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the data the next iteration is; the Trainer calls it."""
        self.epoch = epoch

    def state_at(self, rows: int) -> dict[str, Any]:
        """Where the pass under way stands after its first `rows` rows; JSON can say it.

        Rows may have been read ahead of the one that is asked about, RECENT_ROWS at most.

        Raises:
            ValueError: if so many rows were not read yet, or more than RECENT_ROWS were read since.
        """
        if rows not in self._marks:
            known = f"{min(self._marks)} to {max(self._marks)}" if self._marks else "none"
            raise ValueError(f"the place after row {rows} is not known; those known: {known}")
        place, document, offset = self._marks[rows]
        return {"epoch": self._marked_epoch, "rows": rows, "block": place, "document": document, "offset": offset}

    def resume(self, state: dict[str, Any]) -> None:
        """The next iteration that is pass `state["epoch"]` goes on from there.

        Its first `state["rows"]` rows are one row over and over, without any text, for the Trainer to skip.

        Args:
            state: from `state_at`, of a stream of the same documents, sequence length and seed.
        """
        self._resumed = state
        self._begin(state)

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            raise UserError("A stream is read in the process that trains: its DataLoader takes no workers.")
        epoch = self.epoch
        state = {"epoch": epoch, "rows": 0, "block": None, "document": 0, "offset": 0}
        if self._resumed is not None and self._resumed["epoch"] == epoch:
            state, self._resumed = self._resumed, None
        self._begin(state)
        rows, first_document, first_offset = state["rows"], state["document"], state["offset"]
        if rows:
            skipped = _row([np.full(self.sequence_length, self.pad_token_id)], self.sequence_length, self.pad_token_id)
            yield from repeat(skipped, rows)

        pieces: list[Tokens] = []
        room = self.sequence_length
        place, number, offset = state["block"], first_document, first_offset
        for block in self.open_blocks(epoch, state["block"]):
            place = block.place
            for number, document in islice(enumerate(block.documents), first_document, None):
                offset, first_offset = first_offset, 0
                while offset < len(document):
                    pieces.append(document[offset : offset + room])
                    offset += len(pieces[-1])
                    room -= len(pieces[-1])
                    if room == 0:
                        row = _row(pieces, self.sequence_length, self.pad_token_id)
                        pieces, room = [], self.sequence_length
                        rows += 1
                        self._mark(rows, place, number, offset)
                        yield row
            first_document = first_offset = 0
        if pieces:
            self._mark(rows + 1, place, number, offset)
            yield _row(pieces, self.sequence_length, self.pad_token_id)

    def _begin(self, state: dict[str, Any]) -> None:
        self._marks.clear()
        self._marked_epoch = state["epoch"]
        self._mark(state["rows"], state["block"], state["document"], state["offset"])

    def _mark(self, rows: int, place: dict[str, Any] | None, document: int, offset: int) -> None:
        self._marks[rows] = (place, document, offset)
        if len(self._marks) > RECENT_ROWS:
            del self._marks[next(iter(self._marks))]


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
