"""The real tokens of a call: which columns they stand in, which sequences they form, and what each is to predict.

Legend: B rows, S columns, N real tokens (packed), G sequences.

Every model of a recipe shares this, so that all of them see the same documents and are scored on the same targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moxe.ops.cross_entropy import IGNORED
from moxe.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The real tokens of a [B, S] call, row by row."""

    shape: tuple[int, int]
    column: Tensor | None  # [N] places in the flattened [B * S]; None when every column is a token
    cu_seqlens: Tensor  # [G + 1] first token of each sequence, host
    row: Tensor  # [G] row of each sequence, host

    @cached_property
    def sequences(self) -> Segments:
        return Segments(self.cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [N, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.column is None else flat.index_select(0, self.column)

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """[N, ...] -> [B, S, ...]; other columns hold `fill`."""
        if self.column is not None:
            full = x.new_full((self.shape[0] * self.shape[1], *x.shape[1:]), fill)
            x = full.index_copy(0, self.column, x)
        return x.unflatten(0, self.shape)


def pack_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, labels: Tensor | None = None
) -> PackedTokens:
    """Finds the real tokens and the sequences they form: one a row, or one a document of a row.

    Raises:
        ValueError: for token ids that are not [B, S], or another input that is not of their shape.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {tuple(input_ids.shape)}")
    for name, other in (("attention_mask", attention_mask), ("document_ids", document_ids), ("labels", labels)):
        if other is not None and other.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(other.shape)}"
            )
    batch, length = input_ids.shape
    keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool().flatten().nonzero()
    column = None if keep is None else keep.flatten()
    if column is None and length == 1:
        return PackedTokens((batch, length), None, torch.arange(batch + 1), torch.arange(batch))
    place = torch.arange(batch * length, device=input_ids.device) if column is None else column
    row = place // max(length, 1)
    begins = torch.ones_like(place, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    if document_ids is not None:
        document = document_ids.flatten()[place]
        begins[1:] |= document[1:] != document[:-1]
    first = begins.nonzero().flatten()
    cu_seqlens = torch.cat([first.cpu(), torch.tensor([len(place)])])
    return PackedTokens((batch, length), column, cu_seqlens, row[first].cpu())


def check_vocabulary(what: str, ids: Tensor, size: int) -> None:
    """Refuse ids that are not from 0 to `size` - 1; `what` is what the sentence calls one.

    Raises:
        ValueError: naming the first such id.
    """
    lowest, highest = ids.aminmax() if len(ids) else (0, 0)
    if lowest < 0 or highest >= size:
        outside = ids[(ids < 0) | (ids >= size)]
        raise ValueError(f"{what} {int(outside[0])} is outside the vocabulary: ids run from 0 to {size - 1}")


def next_labels(labels: Tensor, sequences: Segments) -> Tensor:
    """[N] the label of the next token of the same sequence, -100 for a sequence's last token."""
    targets = torch.full_like(labels, IGNORED)
    targets[:-1] = labels[1:]
    last = sequences.cu_seqlens[1:] - 1
    targets[last.to(labels.device)] = IGNORED
    return targets
