"""From the experts chosen for each token to sorted rows and segments, and back.

Legend: N packed tokens, D hidden size, E experts, K experts a token, G sequences (or documents).

The N K (token, expert) assignments are sorted by (expert, sequence, time). The rows of an expert are then consecutive,
and each (expert, sequence) pair is one segment: the ordered sub-sequence of the tokens that the expert sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moxe.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """The rows of consecutive experts `first` to `last` - 1 (one weight stack)."""

    rows: slice
    segments: Segments
    sequence: Tensor  # [segments] the sequence each segment belongs to, host
    expert: Tensor  # [segments] its expert, counted from `first`, host


@dataclass(frozen=True, eq=False)
class Assignments:
    """Where each (token, expert) assignment went."""

    token_of_row: Tensor  # [N K] token of each sorted row
    row_of_slot: Tensor  # [N K] sorted row of assignment k of token n, at n K + k
    experts_per_token: int
    cu_rows: Tensor  # [segments + 1], host
    expert_of_segment: Tensor  # host
    sequence_of_segment: Tensor  # host

    def of_experts(self, first: int, last: int) -> ExpertRows:
        """The rows and segments of experts `first` to `last` - 1."""
        bounds = torch.searchsorted(self.expert_of_segment, torch.arange(first, last + 1)).tolist()
        begin, end = bounds[0], bounds[-1]
        cu = self.cu_rows[begin : end + 1]
        segments = Segments(cu - cu[0], tuple(bound - begin for bound in bounds))
        return ExpertRows(
            slice(int(cu[0]), int(cu[-1])),
            segments,
            self.sequence_of_segment[begin:end],
            self.expert_of_segment[begin:end] - first,
        )


def assign(expert_indices: Tensor, sequences: Segments, *, one_token_segments: bool = False) -> Assignments:
    """Sorts the assignments.

    Args:
        expert_indices: [N, K] the experts of each token.
        sequences: which tokens form a sequence.
        one_token_segments: every assignment is a segment of its own, so that no state is carried.

    Raises:
        ValueError: when the sequences do not cover exactly the tokens of `expert_indices`.
    """
    tokens, k = expert_indices.shape
    if sequences.num_tokens != tokens:
        raise ValueError(f"sequences cover {sequences.num_tokens} tokens but expert_indices has {tokens}")
    flat = expert_indices.flatten()
    slot_of_row = torch.argsort(flat, stable=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(tokens * k, device=flat.device)
    token_of_row = slot_of_row // k

    expert = flat[slot_of_row].cpu()
    sequence = sequences.segment_of_token[token_of_row.cpu()]
    begins = torch.ones(tokens * k, dtype=torch.bool)
    if not one_token_segments:
        begins[1:] = (expert[1:] != expert[:-1]) | (sequence[1:] != sequence[:-1])
    first_row = begins.nonzero().flatten()
    cu_rows = torch.cat([first_row, torch.tensor([tokens * k])])
    return Assignments(token_of_row, row_of_slot, k, cu_rows, expert[first_row], sequence[first_row])


def dispatch(x: Tensor, assignments: Assignments) -> Tensor:
    """[N, D] -> [N K, D]: each token's vector once for each of its experts, in sorted order."""
    return _Dispatch.apply(x, assignments)


def combine(y: Tensor, weights: Tensor, assignments: Assignments) -> Tensor:
    """Sum over a token's experts: y [N K, D] in sorted order, weights [N, K] -> [N, D]."""
    of_slot = _Permute.apply(y, assignments.row_of_slot)
    return torch.einsum("nk,nkd->nd", weights.to(y.dtype), of_slot.unflatten(0, weights.shape))


class _Dispatch(torch.autograd.Function):
    """A gather whose backward pass is a gather and a sum too: deterministic, and no scattered additions."""

    @staticmethod
    def forward(ctx, x: Tensor, assignments: Assignments) -> Tensor:
        ctx.assignments = assignments
        return x.index_select(0, assignments.token_of_row)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        of_slot = dy.index_select(0, ctx.assignments.row_of_slot)
        return of_slot.unflatten(0, (-1, ctx.assignments.experts_per_token)).sum(1), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return y.index_select(0, order)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(dy).index_copy_(0, ctx.order, dy), None
