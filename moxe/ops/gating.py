"""What gates an inner product: SwiGLU's half of a feed-forward block, and the end of an mLSTM block.

Legend: N rows, F width, C channels, H heads of C / H channels, E groups (weight sets: experts, or 1 for a mixer).

    gated_silu:    y = SiLU(a) b                           for rows [a, b]
    mlstm_output:  y = (norm(h) w_e + skip_e s) SiLU(g)    norm over each head, s the convolved branch

`row_offsets` (E + 1 host numbers) say which rows belong to a group; a group may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moxe.ops.backend import apply_function, autocast_dtype, core_dtype, resolve_backend
from moxe.ops.norm import check_channels, head_norm, stacked_scale


def gated_silu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """SiLU of the first half of each row of x [N, 2 F] times the second half: [N, F] in the dtype of x.

    Args:
        backend: `auto`, `cpu` or `torch`; `reference` is `torch` here.

    Raises:
        ValueError: for rows that have no halves or an unknown backend.
    """
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"x must be [N, 2 F], got {tuple(x.shape)}")
    if resolve_backend(backend, x.device.type) == "cpu":
        return apply_function(_GatedSiLU, x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlstm_output(
    h: Tensor,
    convolved: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    skip: Tensor,
    row_offsets: Sequence[int],
    *,
    heads: int,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """(norm(h) norm_weight + skip convolved) SiLU(gate), the norm over each of `heads` parts of a row.

    Args:
        h, convolved, gate: [N, C]: the cell's output, the convolved branch and the gating branch.
        norm_weight, skip: [E, C].
        eps: is added to the variance.
        backend: `auto`, `cpu` or `torch`; `reference` is `torch` here.

    Returns:
        [N, C]. The C++ gives the dtype that h, convolved and gate promote to, and bfloat16 under an autocast to it,
        since a projection reads the result.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    check_channels(h, norm_weight, row_offsets, heads)
    if not h.shape == convolved.shape == gate.shape or skip.shape != norm_weight.shape:
        raise ValueError(
            f"h, convolved, gate must be [N, C] = {tuple(h.shape)} and skip [E, C] = {tuple(norm_weight.shape)}, "
            f"got {tuple(convolved.shape)}, {tuple(gate.shape)}, {tuple(skip.shape)}"
        )
    if resolve_backend(backend, h.device.type) == "cpu":
        stored = reduce(torch.promote_types, (h.dtype, convolved.dtype, gate.dtype))
        h, convolved, gate = h.to(stored), convolved.to(stored), gate.to(stored)
        parameters = norm_weight.to(core_dtype(h)), skip.to(core_dtype(h))
        return apply_function(
            _MLSTMOutput, h, convolved, gate, *parameters, tuple(row_offsets), heads, eps, autocast_dtype(h)
        )
    normed = stacked_scale(head_norm(h, heads, eps), norm_weight, row_offsets)
    return (normed + stacked_scale(convolved, skip, row_offsets)) * F.silu(gate)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.moxe.gated_silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return torch.ops.moxe.gated_silu_backward(dy, *ctx.saved_tensors)


class _MLSTMOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, convolved, gate, norm_weight, skip, row_offsets, heads, eps, dtype) -> Tensor:
        inputs = h, convolved, gate, norm_weight, skip
        y, statistics = torch.ops.moxe.mlstm_output(*inputs, row_offsets, heads, eps, dtype)
        ctx.save_for_backward(*inputs, statistics)
        ctx.row_offsets, ctx.heads = row_offsets, heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gradients = torch.ops.moxe.mlstm_output_backward(dy, *ctx.saved_tensors, ctx.row_offsets, ctx.heads)
        return *gradients, None, None, None, None


# The implementations are those of gating.cpp.
torch.library.define("moxe::gated_silu", "(Tensor x) -> Tensor")
torch.library.define("moxe::gated_silu_backward", "(Tensor dy, Tensor x) -> Tensor")
_INPUTS = "Tensor h, Tensor convolved, Tensor gate, Tensor norm_weight, Tensor skip"
torch.library.define(
    "moxe::mlstm_output", f"({_INPUTS}, int[] row_offsets, int heads, float eps, ScalarType dtype) -> (Tensor, Tensor)"
)
torch.library.define(
    "moxe::mlstm_output_backward",
    f"(Tensor dy, {_INPUTS}, Tensor statistics, int[] row_offsets, int heads) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moxe::gated_silu")
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.register_fake("moxe::gated_silu_backward")
def _(dy, x):
    return x.new_empty(x.shape)


@torch.library.register_fake("moxe::mlstm_output")
def _(h, convolved, gate, norm_weight, skip, row_offsets, heads, eps, dtype):
    return h.new_empty(h.shape, dtype=dtype), h.new_empty(h.shape[0], heads, 2, dtype=core_dtype(h))


@torch.library.register_fake("moxe::mlstm_output_backward")
def _(dy, h, convolved, gate, norm_weight, skip, statistics, row_offsets, heads):
    of_rows = (h.new_empty(h.shape) for _ in range(3))
    return *of_rows, torch.empty_like(norm_weight), torch.empty_like(skip)
