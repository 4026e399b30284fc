"""Which documents are held out for validation: decided by their content alone."""

from collections.abc import Callable, Iterable

import numpy as np

from moxe.data.encoding import document_hash
from moxe.errors import UserError

HASHES = 2**64


def hold_out(open_documents: Callable[[], Iterable[str]], *, fraction: float, count: int | None) -> list[str]:
    """The held-out documents, in their order: those with the smallest hashes.

    A document is held out if its hash lies in the lowest `fraction` of all numbers, whatever the other documents are,
    but at least one is, and one is left to train on. With `count`, the documents of the `count` smallest hashes are.
    Copies of a document go with it, in either case. No seed has a part in this: all runs hold out the same documents.

    Args:
        open_documents: gives the documents; called twice.
        fraction: of the documents, between 0 and 1.
        count: of distinct documents; None: by fraction.

    Raises:
        UserError: if there are fewer than two distinct documents, or no more than `count`.
    """
    hashes = np.unique(np.fromiter(map(document_hash, open_documents()), dtype=np.uint64))
    if len(hashes) < 2:
        raise UserError(
            "The training source is a single document, of which no part can be held out; set data.validation_source, "
            'or data.document_separator to the line that ends a document in your .txt files ("" for blank lines).'
        )
    if count is not None and count >= len(hashes):
        raise UserError(
            f"data.validation_documents is {count}, but the source has {len(hashes)} distinct documents in all."
        )
    if count is not None:
        largest = int(hashes[count - 1])
    else:
        largest = min(max(int(fraction * HASHES), int(hashes[0])), int(hashes[-2]))
    return [text for text in open_documents() if document_hash(text) <= largest]
