"""The sLSTM cell in C++: the operator that `cpu.cpp` implements, and its gradient.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype

_ROWS_SAVED = 6  # of Dh numbers, for each token and head


def slstm_cpu(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    group_offsets: list[int],
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    h0: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh] and the final c, n, m, h of each segment (empty tensors unless asked for).

    Without c0, n0, m0 and h0 every segment begins empty; bias [E, H, 4, Dh] is added to the gates.
    """
    core = core_dtype(gates)
    inputs = (recurrent, bias, c0, n0, m0, h0)
    recurrent, bias, *state = (None if x is None else x.to(core).contiguous() for x in inputs)  # type: ignore[assignment]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gates, *inputs))
    tensors = (gates, recurrent, bias, cu_seqlens, group_offsets, *state)
    h, c, n, m, h_final, _, _ = torch.ops.moxe.slstm_cpu(*tensors, return_final_state, needs_grad)
    return h, c, n, m, h_final


# R, bias and states are contiguous and float32, or float64 with gates in float64; each row of gates is contiguous or
# else all of them are copied. `saved` and `hidden` are for the backward pass and empty unless a gradient is needed.
torch.library.define(
    "moxe::slstm_cpu",
    "(Tensor gates, Tensor recurrent, Tensor? bias, Tensor cu_seqlens, int[] group_offsets, Tensor? c0, Tensor? n0, "
    "Tensor? m0, Tensor? h0, bool return_final_state, bool needs_grad) -> "
    "(Tensor h, Tensor c, Tensor n, Tensor m, Tensor h_final, Tensor saved, Tensor hidden)",
)
torch.library.define(
    "moxe::slstm_cpu_backward",
    "(Tensor recurrent, Tensor cu_seqlens, int[] group_offsets, Tensor? c0, Tensor? n0, Tensor? h0, Tensor saved, "
    "Tensor hidden, Tensor? dh, Tensor? dc_final, Tensor? dn_final, Tensor? dh_final, ScalarType gates_dtype, "
    "bool has_bias) -> "
    "(Tensor dgates, Tensor drecurrent, Tensor dbias, Tensor dc0, Tensor dn0, Tensor dh0)",
)


@torch.library.register_fake("moxe::slstm_cpu")
def _(gates, recurrent, bias, cu_seqlens, group_offsets, c0, n0, m0, h0, return_final_state, needs_grad):
    dtype, (tokens, heads, _, size) = core_dtype(gates), gates.shape
    segments = cu_seqlens.shape[0] - 1 if return_final_state else 0
    final = (gates.new_empty(segments, heads, size, dtype=dtype) for _ in range(4))
    saved = gates.new_empty(tokens if needs_grad else 0, heads, _ROWS_SAVED, size, dtype=dtype)
    hidden = gates.new_empty(tokens if needs_grad and gates.dtype != dtype else 0, heads, size, dtype=dtype)
    return (gates.new_empty(tokens, heads, size), *final, saved, hidden)


@torch.library.register_fake("moxe::slstm_cpu_backward")
def _(recurrent, cu_seqlens, group_offsets, c0, n0, h0, saved, hidden, dh, dc, dn, dh_final, gates_dtype, has_bias):
    groups, heads, size, gates, _ = recurrent.shape
    segments = 0 if c0 is None else c0.shape[0]
    return (
        saved.new_empty(saved.shape[0], heads, gates, size, dtype=gates_dtype),
        torch.empty_like(recurrent),
        saved.new_empty(groups if has_bias else 0, heads, gates, size),
        *(saved.new_empty(segments, heads, size) for _ in range(3)),
    )


def _setup_context(ctx, inputs, output) -> None:
    gates, recurrent, bias, cu_seqlens, ctx.group_offsets, c0, n0, _, h0, return_final_state, _ = inputs
    h, _, _, m, _, saved, hidden = output
    ctx.save_for_backward(recurrent, cu_seqlens, c0, n0, h0, saved, h if h.dtype == saved.dtype else hidden)
    ctx.gates_dtype, ctx.has_bias, ctx.final_is_empty = gates.dtype, bias is not None, not return_final_state
    ctx.mark_non_differentiable(m, saved, hidden)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dn, dm, dh_final, *of_saved):
    if dh is None and dc is None and dn is None and dh_final is None:
        return (None,) * 11
    if ctx.final_is_empty:
        dc = dn = dh_final = None
    of_outputs = (None if x is None else x.contiguous() for x in (dh, dc, dn, dh_final))
    recurrent, cu_seqlens, c0, *others = ctx.saved_tensors
    inputs = (recurrent, cu_seqlens, ctx.group_offsets, c0, *others)
    dgates, drecurrent, dbias, *dstate = torch.ops.moxe.slstm_cpu_backward(
        *inputs, *of_outputs, ctx.gates_dtype, ctx.has_bias
    )
    dc0, dn0, dh0 = (None, None, None) if c0 is None else dstate
    return dgates, drecurrent, dbias if ctx.has_bias else None, None, None, dc0, dn0, None, dh0, None, None


torch.library.register_autograd("moxe::slstm_cpu", _backward, setup_context=_setup_context)
