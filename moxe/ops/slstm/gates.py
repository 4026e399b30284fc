"""The gates of the sLSTM before the recurrence: i and f from the convolved rows, z and o from the normed ones.

Legend: N rows, E groups (weight sets), D channels, H heads, Dh = D / H.

    [i, f] = convolved W_if + b_if;  [z, o] = normed W_zo + b_zo;  block-diagonal by head
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moxe.ops.backend import apply_function, core_dtype, resolve_backend
from moxe.ops.grouped_linear import grouped_block_linear


def slstm_gates(
    convolved: Tensor,
    normed: Tensor,
    if_weight: Tensor,
    zo_weight: Tensor,
    bias: Tensor,
    row_offsets: Sequence[int],
    *,
    backend: str = "auto",
) -> Tensor:
    """The pre-activations i, f, z, o of every head without the recurrent part, [N, H, 4, Dh].

    Args:
        convolved, normed: [N, D].
        if_weight, zo_weight: [E, H, Dh, 2 Dh].
        bias: [E, H, 4 Dh].
        row_offsets: rows row_offsets[e] to row_offsets[e + 1] - 1 belong to group e.
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Returns:
        Gates in the wider of the dtypes of rows and bias: float32 under autocast.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    _check(convolved, normed, if_weight, zo_weight, bias, row_offsets)
    heads, size = if_weight.shape[1:3]
    if resolve_backend(backend, normed.device.type) == "cpu":
        stored = torch.promote_types(convolved.dtype, normed.dtype)
        convolved, normed = convolved.to(stored), normed.to(stored)
        parameters = (x.to(core_dtype(normed)) for x in (if_weight, zo_weight, bias))
        gates = apply_function(_SLSTMGatesCpu, convolved, normed, *parameters, tuple(row_offsets))
        return gates.to(torch.promote_types(stored, bias.dtype))
    halves = [
        grouped_block_linear(rows.unflatten(-1, (heads, size)), weight, row_offsets, backend=backend)
        for rows, weight in ((convolved, if_weight), (normed, zo_weight))
    ]
    gates = torch.cat(halves, dim=-1)
    sizes = [end - begin for begin, end in pairwise(row_offsets)]
    by_group = [rows + own for rows, own in zip(gates.split(sizes), bias.unbind(0), strict=True)]
    return torch.cat(by_group).unflatten(-1, (4, size))


def _check(
    convolved: Tensor, normed: Tensor, if_weight: Tensor, zo_weight: Tensor, bias: Tensor, row_offsets: Sequence[int]
) -> None:
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    if if_weight.ndim != 4 or len(if_weight) != groups or if_weight.shape[3] != 2 * if_weight.shape[2]:
        raise ValueError(f"if_weight must be [E, H, Dh, 2 Dh] with E={groups}, got {tuple(if_weight.shape)}")
    heads, size = if_weight.shape[1:3]
    expected = {"convolved": (rows, heads * size), "normed": (rows, heads * size), "zo_weight": if_weight.shape}
    expected |= {"bias": (groups, heads, 4 * size)}
    given = {"convolved": convolved, "normed": normed, "zo_weight": zo_weight, "bias": bias}
    for name, x in given.items():
        if x.shape != expected[name]:
            raise ValueError(f"{name} must be {tuple(expected[name])} here, got {tuple(x.shape)}")


class _SLSTMGatesCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, convolved, normed, if_weight, zo_weight, bias, row_offsets) -> Tensor:
        rows = (x if x.stride(1) == 1 else x.contiguous() for x in (convolved, normed))
        inputs = (*rows, if_weight.contiguous(), zo_weight.contiguous())
        ctx.save_for_backward(*inputs)
        ctx.row_offsets = row_offsets
        return torch.ops.moxe.slstm_gates(*inputs, bias.contiguous(), row_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dgates: Tensor):
        return *torch.ops.moxe.slstm_gates_backward(dgates.contiguous(), *ctx.saved_tensors, ctx.row_offsets), None


_WITHOUT_BIAS = "Tensor convolved, Tensor normed, Tensor if_weight, Tensor zo_weight"
torch.library.define("moxe::slstm_gates", f"({_WITHOUT_BIAS}, Tensor bias, int[] row_offsets) -> Tensor")
torch.library.define(
    "moxe::slstm_gates_backward",
    f"(Tensor dgates, {_WITHOUT_BIAS}, int[] row_offsets) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moxe::slstm_gates")
def _(convolved, normed, if_weight, zo_weight, bias, row_offsets):
    return if_weight.new_empty(normed.shape[0], if_weight.shape[1], 4, if_weight.shape[2])


@torch.library.register_fake("moxe::slstm_gates_backward")
def _(dgates, convolved, normed, if_weight, zo_weight, row_offsets):
    groups, heads, size, _ = if_weight.shape
    dweights = torch.empty_like(if_weight), torch.empty_like(zo_weight)
    rows = convolved.new_empty(convolved.shape), normed.new_empty(normed.shape)
    return *rows, *dweights, if_weight.new_empty(groups, heads, 4 * size)
