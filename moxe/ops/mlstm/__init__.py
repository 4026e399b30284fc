"""The mLSTM cell over segments: matrix memory C, normaliser n, stabiliser m.

Legend: N packed tokens, H heads, Dh head size, G segments.
"""

from __future__ import annotations

from torch import Tensor

from moxe.ops.backend import core_dtype, resolve_backend, without_autocast
from moxe.ops.mlstm.cpu import CHEAPEST, mlstm_cpu
from moxe.ops.mlstm.reference import mlstm_reference
from moxe.ops.mlstm.state import MLSTMState, empty_state
from moxe.ops.mlstm.torch_backend import chunk_length, mlstm_torch
from moxe.ops.segments import Segments

__all__ = ["MLSTMState", "mlstm"]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    segments: Segments,
    *,
    initial_state: MLSTMState | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState | None]:
    """Runs the mLSTM recurrence of `reference.py` over every segment.

    Args:
        q, k, v: [N, H, Dh]; k is scaled by 1/sqrt(Dh) inside.
        igate, fgate: [N, H] pre-activations; i = exp(igate), f = sigmoid(fgate).
        segments: where the recurrences begin and end.
        initial_state: state before each segment; without it every segment begins empty.
        return_final_state: whether to compute the state behind each segment.
        backend: `auto`, `reference`, `torch` or `cpu`.

    Returns:
        h [N, H, Dh] in the dtype of q, and the final state (float32 or float64) or None.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    _check(q, k, v, igate, fgate, segments, initial_state)
    cu_seqlens = segments.cu_seqlens
    # bfloat16 products inside the core spoil its gradients: autocast is for the projections around it.
    with without_autocast(q.device.type):
        chosen = resolve_backend(backend, q.device.type)
        c0, n0, m0 = initial_state or (None, None, None)
        if chosen == "cpu":
            h, *final = mlstm_cpu(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, CHEAPEST, return_final_state)
        elif chosen == "torch":
            longest = chunk_length(q.shape[-1])
            h, *final = mlstm_torch(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest, return_final_state)
        else:
            dtype = core_dtype(q)
            inputs = (q.to(dtype), k.to(dtype), v.to(dtype), igate.to(dtype), fgate.to(dtype))
            state = initial_state or empty_state(segments.num_segments, *q.shape[1:], like=q)
            h, *final = mlstm_reference(*inputs, cu_seqlens, *state)
    h = h.to(q.dtype)
    return h, MLSTMState(*final) if return_final_state else None


def _check(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, segments: Segments, state: MLSTMState | None
) -> None:
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k, v must all be [N, H, Dh], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    tokens, heads, size = q.shape
    if igate.shape != (tokens, heads) or fgate.shape != (tokens, heads):
        raise ValueError(
            f"igate and fgate must be [N, H] = {(tokens, heads)}, got {tuple(igate.shape)}, {tuple(fgate.shape)}"
        )
    if segments.num_tokens != tokens:
        raise ValueError(f"segments cover {segments.num_tokens} tokens but q has {tokens}")
    if state is not None:
        of_m = (segments.num_segments, heads)
        if state.c.shape != (*of_m, size, size) or state.n.shape != (*of_m, size) or state.m.shape != of_m:
            raise ValueError(
                f"initial c, n, m must be [G, H, Dh, Dh] = {(*of_m, size, size)}, [G, H, Dh], [G, H], "
                f"got {tuple(state.c.shape)}, {tuple(state.n.shape)}, {tuple(state.m.shape)}"
            )
