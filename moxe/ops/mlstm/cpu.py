"""The mLSTM cell in C++: the operator that `cpu.cpp` implements, and its gradient.

Legend: N packed tokens, H heads, Dh head size, G segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.backend import core_dtype
from moxe.ops.mlstm.state import empty_state

# Lets the kernel choose the chunk length by head size and length.
CHEAPEST = 0


def mlstm_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    cu_seqlens: Tensor,
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    longest_chunk: int,
    return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [N, H, Dh] and the final c, n, m of each segment (empty tensors unless asked for)."""
    core = core_dtype(q)
    q, k, v = (x.to(q.dtype).contiguous() for x in (q, k, v))
    igate, fgate = igate.to(core).contiguous(), fgate.to(core).contiguous()
    c0, n0, m0 = (None if x is None else x.to(core).contiguous() for x in (c0, n0, m0))
    return torch.ops.moxe.mlstm_cpu(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest_chunk, return_final_state)


# All tensors contiguous; q, k, v in one dtype; gates and states float32, or float64 with q in float64.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, Tensor cu_seqlens, Tensor? c0, Tensor? n0, Tensor? m0, "
    "int longest_chunk"
)
torch.library.define("moxe::mlstm_cpu", f"({_INPUTS}, bool return_final_state) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "moxe::mlstm_cpu_backward",
    f"({_INPUTS}, Tensor? dh, Tensor? dc_final, Tensor? dn_final) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moxe::mlstm_cpu")
def _(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest_chunk, return_final_state):
    c, n, m = empty_state(cu_seqlens.shape[0] - 1 if return_final_state else 0, *q.shape[1:], like=q)
    return torch.empty_like(q), c, n, m


@torch.library.register_fake("moxe::mlstm_cpu_backward")
def _(q, k, v, igate, fgate, cu_seqlens, c0, n0, m0, longest_chunk, dh, dc_final, dn_final):
    dc, dn, _ = empty_state(0 if c0 is None else cu_seqlens.shape[0] - 1, *q.shape[1:], like=q)
    return (*(torch.empty_like(x) for x in (q, k, v, igate, fgate)), dc, dn)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.longest_chunk, return_final_state = inputs
    ctx.final_is_empty = not return_final_state
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dn, dm):
    tensors = ctx.saved_tensors
    if dh is None and dc is None and dn is None:
        return (None,) * 11
    if ctx.final_is_empty:
        dc, dn = None, None
    of_outputs = (None if x is None else x.contiguous() for x in (dh, dc, dn))
    *of_tokens, dc0, dn0 = torch.ops.moxe.mlstm_cpu_backward(*tensors, ctx.longest_chunk, *of_outputs)
    if tensors[6] is None:
        dc0, dn0 = None, None
    return (*of_tokens, None, dc0, dn0, None, None, None)


torch.library.register_autograd("moxe::mlstm_cpu", _backward, setup_context=_setup_context)
