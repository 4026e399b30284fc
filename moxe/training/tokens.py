"""Tokens that the model does not know are found in a batch before it runs.

Legend: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moxe.errors import UserError
from moxe.ops.cross_entropy import IGNORED


def require_known_tokens(batch: Mapping[str, Tensor], vocab_size: int, batch_name: str) -> None:
    """Refuse a batch whose tokens or labels are outside the vocabulary; `batch_name` is what the sentence calls it.

    Args:
        batch: input_ids [B, S] and, where they are given, labels and attention_mask [B, S].

    Raises:
        UserError: naming the first such id with its row and column. Columns that are masked out may hold anything.
    """
    for key, allowed in (("input_ids", 0), ("labels", IGNORED)):
        ids = batch.get(key)
        if ids is None:
            continue
        outside = (ids >= vocab_size) | ((ids < 0) & (ids != allowed))
        if batch.get("attention_mask") is not None:
            outside &= batch["attention_mask"].bool()
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise UserError(
                f"{batch_name} holds the id {int(ids[row, column])} in row {row}, column {column} of its {key}, but "
                f"the model knows {vocab_size} tokens, 0 to {vocab_size - 1}: the data was tokenised for another model"
            )
