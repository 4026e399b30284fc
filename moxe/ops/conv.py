"""Causal depthwise convolution over segments, with SiLU behind it if asked for.

Legend: N packed tokens, C channels, T taps, G segments, E groups (weight sets).

    p_t = bias + sum_j weight_j x_{t - (T - 1) + j};  y_t = p_t, or SiLU(p_t)

The window of a segment's first tokens reaches into the T - 1 inputs before it: the initial state, or zeros. C++ reads
the packed rows where they lie (`conv.cpp`). Elsewhere every segment is laid out with T - 1 rows in front of it, and the
taps become T shifted products of whole slices.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moxe.ops.backend import apply_function, core_dtype, resolve_backend
from moxe.ops.segments import Segments


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Segments,
    *,
    silu: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolves every segment with the taps of its group.

    Args:
        x: [N, C].
        weight, bias: [E, C, T] and [E, C]; the last tap meets the current token.
        segments: where the convolutions begin and end.
        silu: whether y is SiLU of the convolution.
        initial_state: [G, T - 1, C], the inputs before each segment, oldest first; zeros without it.
        return_final_state: whether to return the last T - 1 inputs of each segment.
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Returns:
        y [N, C] in the dtype of x and the final state [G, T - 1, C] (no gradient) or None.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    _check(x, weight, bias, segments, initial_state)
    if resolve_backend(backend, x.device.type) == "cpu":
        return _convolve_where_they_lie(x, weight, bias, segments, silu, initial_state, return_final_state)
    y, final_state = _convolve_by_shift(x, weight, bias, segments, initial_state, return_final_state)
    return F.silu(y) if silu else y, final_state


def _check(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, initial_state: Tensor | None) -> None:
    tokens, groups = segments.num_tokens, segments.num_groups
    agree = weight.ndim == 3 and len(weight) == groups and bias.shape == weight.shape[:2]
    if not agree or x.shape != (tokens, weight.shape[1]):
        raise ValueError(
            f"x, weight, bias must be [N, C], [E, C, T], [E, C] with N={tokens} tokens and E={groups} groups, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    shape = (segments.num_segments, weight.shape[2] - 1, weight.shape[1])
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state must be [G, T - 1, C] = {shape}, got {tuple(initial_state.shape)}")


def _convolve_by_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Segments,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    before = weight.shape[-1] - 1
    token_row = (torch.arange(segments.num_tokens) + before * (segments.segment_of_token + 1)).to(x.device)
    start_row = segments.cu_seqlens[:-1] + torch.arange(segments.num_segments) * before
    state_row = (start_row[:, None] + torch.arange(before)).to(x.device)
    row_offsets = [r + g * before for r, g in zip(segments.row_offsets, segments.group_offsets, strict=True)]
    y = apply_function(_CausalConv, x, weight, bias, initial_state, token_row, state_row, row_offsets)
    if not return_final_state:
        return y, None
    with torch.no_grad():
        padded = _lay_out(x, initial_state, token_row, state_row)
        return y, padded[state_row + segments.lengths.to(x.device)[:, None]]


def _lay_out(x: Tensor, initial_state: Tensor | None, token_row: Tensor, state_row: Tensor) -> Tensor:
    padded = x.new_zeros(len(x) + state_row.numel(), x.shape[1])
    padded.index_copy_(0, token_row, x)
    if initial_state is not None:
        padded[state_row] = initial_state.to(x.dtype)
    return padded


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, token_row, state_row, row_offsets) -> Tensor:
        padded = _lay_out(x, initial_state, token_row, state_row)
        ctx.save_for_backward(padded, weight, token_row, state_row)
        ctx.row_offsets, ctx.has_state = row_offsets, initial_state is not None
        ctx.bias_dtype = bias.dtype
        out = torch.empty_like(padded)
        taps = weight.to(x.dtype).permute(0, 2, 1)
        last = taps.shape[1] - 1
        for e, (begin, end) in enumerate(pairwise(row_offsets)):
            if end == begin:
                continue
            y = out[begin + last : end]
            torch.addcmul(bias[e].to(x.dtype), padded[begin + last : end], taps[e, last], out=y)
            for j in range(last):
                y.addcmul_(padded[begin + j : end - last + j], taps[e, j])
        return out.index_select(0, token_row)

    @staticmethod
    def backward(ctx, dy: Tensor):
        padded, weight, token_row, state_row = ctx.saved_tensors
        dout = torch.zeros_like(padded).index_copy_(0, token_row, dy)
        dpadded = torch.zeros_like(padded)
        taps = weight.to(padded.dtype).permute(0, 2, 1)
        dtaps = torch.zeros(taps.shape, dtype=weight.dtype, device=weight.device)
        dbias = torch.zeros(weight.shape[:2], dtype=ctx.bias_dtype, device=weight.device)
        last = taps.shape[1] - 1
        for e, (begin, end) in enumerate(pairwise(ctx.row_offsets)):
            if end == begin:
                continue
            dy_rows = dout[begin + last : end]
            dbias[e] = dy_rows.sum(0)
            for j in range(last + 1):
                window = slice(begin + j, end - last + j)
                dpadded[window].addcmul_(dy_rows, taps[e, j])
                dtaps[e, j] = (dy_rows * padded[window]).sum(0)
        dinitial = dpadded[state_row] if ctx.has_state else None
        return dpadded.index_select(0, token_row), dtaps.permute(0, 2, 1), dbias, dinitial, None, None, None


def _convolve_where_they_lie(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Segments,
    silu: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, bias = weight.to(core_dtype(x)).contiguous(), bias.to(core_dtype(x)).contiguous()
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y = apply_function(_CausalConvCpu, x, weight, bias, state, segments.cu_seqlens, segments.group_offsets, silu)
    if not return_final_state:
        return y, None
    with torch.no_grad():
        return y, torch.ops.moxe.causal_conv_state(x, state, segments.cu_seqlens, weight.shape[2])


class _CausalConvCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, cu_seqlens, group_offsets, silu) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.group_offsets, ctx.silu = group_offsets, silu
        return torch.ops.moxe.causal_conv(x, weight, bias, state, cu_seqlens, group_offsets, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        dx, dweight, dbias, dstate = torch.ops.moxe.causal_conv_backward(
            dy.contiguous(), x, weight, bias, state, cu_seqlens, ctx.group_offsets, ctx.silu
        )
        return dx, dweight, dbias, None if state is None else dstate, None, None, None


_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? state, Tensor cu_seqlens, int[] group_offsets, bool silu"
torch.library.define("moxe::causal_conv", f"({_INPUTS}) -> Tensor")
torch.library.define("moxe::causal_conv_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("moxe::causal_conv_state", "(Tensor x, Tensor? state, Tensor cu_seqlens, int taps) -> Tensor")


@torch.library.register_fake("moxe::causal_conv")
def _(x, weight, bias, state, cu_seqlens, group_offsets, silu):
    return x.new_empty(x.shape)


@torch.library.register_fake("moxe::causal_conv_backward")
def _(dy, x, weight, bias, state, cu_seqlens, group_offsets, silu):
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias), dstate


@torch.library.register_fake("moxe::causal_conv_state")
def _(x, state, cu_seqlens, taps):
    return x.new_empty(cu_seqlens.shape[0] - 1, taps - 1, x.shape[1])
