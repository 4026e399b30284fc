"""The sLSTM cell over segments: scalar memories with recurrent, block-diagonal gates.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups (weight sets: experts, or 1 for a mixer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype, resolve_backend, without_autocast
from moxe.ops.segments import Segments
from moxe.ops.slstm.cpu import slstm_cpu
from moxe.ops.slstm.reference import slstm_reference
from moxe.ops.slstm.state import SLSTMState, empty_state
from moxe.ops.slstm.torch_backend import slstm_torch

__all__ = ["SLSTMState", "slstm"]


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    segments: Segments,
    *,
    bias: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState | None]:
    """Runs the sLSTM recurrence of `reference.py` over every segment.

    Args:
        gates: [N, H, 4, Dh], W x for the gates i, f, z, o in this order.
        recurrent: [E, H, Dh, 4, Dh], the matrices R (from h to the gates) of each group of segments.
        segments: where the recurrences begin and end, and which group each belongs to.
        bias: [E, H, 4, Dh], b of each group, which is added to its gates; none if it is in them already.
        initial_state: state before each segment; without it every segment begins empty.
        return_final_state: whether to return the state behind each segment.
        backend: `auto`, `reference`, `torch` or `cpu`.

    Returns:
        h [N, H, Dh] in the dtype of gates, and the final state (float32 or float64) or None.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    _check(gates, recurrent, segments, bias, initial_state)
    stored_in, dtype = gates.dtype, core_dtype(gates)
    layout = (segments.cu_seqlens, list(segments.group_offsets))
    with without_autocast(gates.device.type):
        chosen = resolve_backend(backend, gates.device.type)
        if chosen == "cpu":
            state = initial_state or (None, None, None, None)
            h, *final = slstm_cpu(gates, recurrent, bias, *layout, *state, return_final_state)
            return h, SLSTMState(*final) if return_final_state else None
        if bias is not None:
            gates = gates.to(dtype) + _of_tokens(bias.to(dtype), segments)
        state = initial_state or empty_state(segments.num_segments, gates.shape[1], gates.shape[3], like=gates)
        if chosen == "torch":
            h, *final, _, _ = slstm_torch(gates, recurrent, *layout, *state, return_final_state)
        else:
            h, *final = slstm_reference(gates.to(dtype), recurrent.to(dtype), *layout, *state)
    return h.to(stored_in), SLSTMState(*final) if return_final_state else None


def _of_tokens(bias: Tensor, segments: Segments) -> Tensor:
    """The bias of each token's group: [E, ...] -> [N, ...], or [1, ...] with one group."""
    if segments.num_groups == 1:
        return bias
    tokens = torch.tensor(segments.row_offsets).diff()
    return bias.repeat_interleave(tokens.to(bias.device), dim=0, output_size=segments.num_tokens)


def _check(gates: Tensor, recurrent: Tensor, segments: Segments, bias: Tensor | None, state: SLSTMState | None) -> None:
    if gates.ndim != 4 or gates.shape[2] != 4:
        raise ValueError(f"gates must be [N, H, 4, Dh], got {tuple(gates.shape)}")
    tokens, heads, _, size = gates.shape
    if recurrent.shape != (segments.num_groups, heads, size, 4, size):
        raise ValueError(
            f"recurrent must be [E, H, Dh, 4, Dh] = {(segments.num_groups, heads, size, 4, size)}, "
            f"got {tuple(recurrent.shape)}"
        )
    if bias is not None and bias.shape != (segments.num_groups, heads, 4, size):
        raise ValueError(
            f"bias must be [E, H, 4, Dh] = {(segments.num_groups, heads, 4, size)}, got {tuple(bias.shape)}"
        )
    if segments.num_tokens != tokens:
        raise ValueError(f"segments cover {segments.num_tokens} tokens but gates has {tokens}")
    shape = (segments.num_segments, heads, size)
    if state is not None and any(x.shape != shape for x in state):
        raise ValueError(f"initial c, n, m, h must be [G, H, Dh] = {shape}, got {[tuple(x.shape) for x in state]}")
