"""The sLSTM cell over segments: scalar memories with recurrent, block-diagonal gates.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups (weight sets: experts, or 1 for a mixer).
"""

from __future__ import annotations

from torch import Tensor

from moxe.ops.backend import core_dtype, resolve_backend, without_autocast
from moxe.ops.segments import Segments
from moxe.ops.slstm.reference import slstm_reference
from moxe.ops.slstm.state import SLSTMState, empty_state
from moxe.ops.slstm.torch_backend import slstm_torch

__all__ = ["SLSTMState", "slstm"]


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    segments: Segments,
    *,
    initial_state: SLSTMState | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState | None]:
    """Runs the sLSTM recurrence of `reference.py` over every segment.

    Args:
        gates: [N, H, 4, Dh], W x + b for the gates i, f, z, o in this order.
        recurrent: [E, H, Dh, 4, Dh], the matrices R (from h to the gates) of each group of segments.
        segments: where the recurrences begin and end, and which group each belongs to.
        initial_state: state before each segment; without it every segment begins empty.
        return_final_state: whether to return the state behind each segment.
        backend: `auto`, `reference` or `torch`.

    Returns:
        h [N, H, Dh] in the dtype of gates, and the final state (float32 or float64) or None.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    _check(gates, recurrent, segments, initial_state)
    heads, size = gates.shape[1], gates.shape[3]
    offsets = list(segments.group_offsets)
    state = initial_state or empty_state(segments.num_segments, heads, size, like=gates)
    with without_autocast(gates.device.type):
        if resolve_backend(backend, gates.device.type) == "torch":
            inputs = (gates, recurrent, segments.cu_seqlens, offsets, *state)
            h, *final, _, _ = slstm_torch(*inputs, return_final_state)
        else:
            dtype = core_dtype(gates)
            inputs = (gates.to(dtype), recurrent.to(dtype), segments.cu_seqlens, offsets, *state)
            h, *final = slstm_reference(*inputs)
    h = h.to(gates.dtype)
    return h, SLSTMState(*final) if return_final_state else None


def _check(gates: Tensor, recurrent: Tensor, segments: Segments, state: SLSTMState | None) -> None:
    if gates.ndim != 4 or gates.shape[2] != 4:
        raise ValueError(f"gates must be [N, H, 4, Dh], got {tuple(gates.shape)}")
    tokens, heads, _, size = gates.shape
    if recurrent.shape != (segments.num_groups, heads, size, 4, size):
        raise ValueError(
            f"recurrent must be [E, H, Dh, 4, Dh] = {(segments.num_groups, heads, size, 4, size)}, "
            f"got {tuple(recurrent.shape)}"
        )
    if segments.num_tokens != tokens:
        raise ValueError(f"segments cover {segments.num_tokens} tokens but gates has {tokens}")
    shape = (segments.num_segments, heads, size)
    if state is not None and any(x.shape != shape for x in state):
        raise ValueError(f"initial c, n, m, h must be [G, H, Dh] = {shape}, got {[tuple(x.shape) for x in state]}")
