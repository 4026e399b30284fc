"""Segments: the one form of input to every recurrent op.

Legend: N packed tokens, G segments, E groups of segments (one a weight set: an expert, or 1 for a mixer).

A segment is a run of consecutive packed tokens that share one recurrence: a row of a batch, a document of a packed
row, the tokens of one sequence that were routed to one expert, one decoding step. No padding token exists inside an op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each segment lies among the packed tokens, and which weights (group) it uses.

    Args:
        cu_seqlens: [G + 1] int64 in host memory; segment g holds tokens cu_seqlens[g] to cu_seqlens[g + 1] - 1.
            A segment may be empty.
        group_offsets: E + 1 segment numbers; group e holds segments group_offsets[e] to group_offsets[e + 1] - 1,
            so the tokens of a group are consecutive too. Default: one group with all segments.

    Raises:
        ValueError: when the offsets do not start at 0, decrease, or do not end at G.
    """

    cu_seqlens: Tensor
    group_offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if cu.ndim != 1 or cu.dtype != torch.int64 or cu.device.type != "cpu" or len(cu) < 1:
            raise ValueError(
                f"cu_seqlens must be G + 1 int64 numbers on the host, not {tuple(cu.shape)} {cu.dtype} on {cu.device}"
            )
        if cu[0] != 0 or bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu.tolist()}")
        object.__setattr__(self, "cu_seqlens", cu.contiguous())
        if not self.group_offsets:
            object.__setattr__(self, "group_offsets", (0, len(cu) - 1))
        offsets = self.group_offsets
        if offsets[0] != 0 or offsets[-1] != len(cu) - 1 or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(f"group_offsets must rise from 0 to G={len(cu) - 1}, got {offsets}")

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, group_offsets: tuple[int, ...] = ()) -> Segments:
        """Segments of the given lengths, one behind the other."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        return cls(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), group_offsets)

    @property
    def num_segments(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """[G] int64, host: tokens of each segment."""
        return self.cu_seqlens.diff()

    @cached_property
    def row_offsets(self) -> tuple[int, ...]:
        """E + 1 token numbers: group e holds tokens row_offsets[e] to row_offsets[e + 1] - 1."""
        return tuple(self.cu_seqlens[list(self.group_offsets)].tolist())

    @cached_property
    def segment_of_token(self) -> Tensor:
        """[N] int64, host: the segment of each token."""
        return torch.repeat_interleave(torch.arange(self.num_segments), self.lengths)

    @cached_property
    def position_of_token(self) -> Tensor:
        """[N] int64, host: how many tokens of its segment stand before each token."""
        return torch.arange(self.num_tokens) - self.cu_seqlens[self.segment_of_token]
