"""From the experts chosen for each token to sorted rows and segments, and back.

Legend: N packed tokens, D hidden size, E experts, K experts a token, G sequences (or documents).

The N K (token, expert) assignments are sorted by (expert, sequence, time). The rows of an expert are then consecutive,
and each (expert, sequence) pair is one segment: the ordered sub-sequence of the tokens that the expert sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moxe.ops.backend import apply_function, autocast_dtype, core_dtype, resolve_backend
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


def dispatch(x: Tensor, assignments: Assignments, *, backend: str = "auto") -> Tensor:
    """[N, D] -> [N K, D]: each token's vector once for each of its experts, in sorted order.

    Raises:
        ValueError: for an unknown backend (`auto`, `cpu`, `torch`; `reference` is `torch` here).
    """
    chosen = resolve_backend(backend, x.device.type)
    a = assignments
    return apply_function(_Dispatch, x, a.token_of_row, a.row_of_slot, a.experts_per_token, chosen)


def combine(
    y: Tensor, weights: Tensor, assignments: Assignments, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Sum over a token's experts, on top of the residual if there is one.

    Args:
        y: [N K, D] in sorted order.
        weights: [N, K].
        residual: [N, D].
        backend: `auto`, `cpu` or `torch`; `reference` is `torch` here.

    Returns:
        [N, D]. With a residual in the dtype that it and y promote to, else in that of y, and in autocast's under one.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    rows, tokens = len(assignments.token_of_row), len(assignments.token_of_row) // assignments.experts_per_token
    agree = residual is None or residual.shape == (tokens, *y.shape[1:])
    if y.ndim != 2 or len(y) != rows or weights.shape != (tokens, assignments.experts_per_token) or not agree:
        raise ValueError(
            f"y, weights and residual must be [N K, D], [N, K] and [N, D] with N={tokens} tokens and "
            f"K={assignments.experts_per_token} experts a token, got {tuple(y.shape)}, {tuple(weights.shape)}, "
            f"{None if residual is None else tuple(residual.shape)}"
        )
    if resolve_backend(backend, y.device.type) == "cpu":
        dtype = autocast_dtype(y)
        if residual is not None:
            dtype = torch.promote_types(residual.dtype, y.dtype)
            residual = residual.to(dtype)
        return apply_function(_Combine, y, weights.to(core_dtype(y)), residual, assignments.row_of_slot, dtype)
    of_slot = apply_function(_Permute, y, assignments.row_of_slot)
    combined = torch.einsum("nk,nkd->nd", weights.to(y.dtype), of_slot.unflatten(0, weights.shape))
    return combined if residual is None else residual + combined


class _Dispatch(torch.autograd.Function):
    """A gather whose backward pass is a gather and a sum too: deterministic, and no scattered additions."""

    @staticmethod
    def forward(ctx, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor, experts_per_token: int, backend: str):
        ctx.save_for_backward(row_of_slot)
        ctx.experts_per_token, ctx.backend = experts_per_token, backend
        return x.index_select(0, token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (row_of_slot,) = ctx.saved_tensors
        if ctx.backend == "cpu":
            dx = torch.ops.moxe.combine(dy, None, None, row_of_slot, ctx.experts_per_token, dy.dtype)
        else:
            dx = dy.index_select(0, row_of_slot).unflatten(0, (-1, ctx.experts_per_token)).sum(1)
        return dx, None, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return y.index_select(0, order)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(dy).index_copy_(0, ctx.order, dy), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, residual: Tensor | None, row_of_slot: Tensor, dtype: torch.dtype):
        weights = weights.contiguous()
        ctx.save_for_backward(y, weights, row_of_slot)
        return torch.ops.moxe.combine(y, weights, residual, row_of_slot, weights.shape[1], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        dy, dweights = torch.ops.moxe.combine_backward(dout, *ctx.saved_tensors)
        return dy, dweights, dout if ctx.needs_input_grad[2] else None, None, None


# The implementations are those of routing.cpp.
torch.library.define(
    "moxe::combine",
    "(Tensor y, Tensor? weights, Tensor? residual, Tensor row_of_slot, int experts_per_token, ScalarType dtype)"
    " -> Tensor",
)
torch.library.define(
    "moxe::combine_backward", "(Tensor dout, Tensor y, Tensor weights, Tensor row_of_slot) -> (Tensor, Tensor)"
)


@torch.library.register_fake("moxe::combine")
def _(y, weights, residual, row_of_slot, experts_per_token, dtype):
    return y.new_empty(row_of_slot.shape[0] // experts_per_token, y.shape[1], dtype=dtype)


@torch.library.register_fake("moxe::combine_backward")
def _(dout, y, weights, row_of_slot):
    return y.new_empty(y.shape), torch.empty_like(weights)
