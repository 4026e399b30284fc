"""The gates of the mLSTM, from the queries, keys and values of all heads at once.

Legend: N rows, E groups (weight sets), C channels, H heads.

    [igate, fgate] = [q, k, v] W^T + b

Always computed in the precision of the parameters: what the cell exponentiates and adds up over a whole sequence is no
place for bfloat16. In C++ (`gates.cpp`) the three sources are read once, in whatever precision they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moxe.ops.backend import apply_function, core_dtype, resolve_backend, without_autocast
from moxe.ops.grouped_linear import grouped_linear


def mlstm_gates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Sequence[int],
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The pre-activations igate and fgate, [N, H] each, in float32 (float64 for parameters in it).

    Args:
        q, k, v: [N, C].
        weight: [E, 2 H, 3 C]; rows: igate of each head, then fgate of each head; columns: q, k, v.
        bias: [E, 2 H].
        row_offsets: rows row_offsets[e] to row_offsets[e + 1] - 1 belong to group e.
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    check_gates(q, k, v, weight, bias, row_offsets)
    dtype = core_dtype(weight)
    weight, bias = weight.to(dtype), bias.to(dtype)
    with without_autocast(q.device.type):
        if resolve_backend(backend, q.device.type) == "cpu":
            # Rows of one precision, and float64 if and only if the parameters are.
            stored = q.dtype if q.dtype == k.dtype == v.dtype and core_dtype(q) == dtype else dtype
            rows = (x.to(stored) for x in (q, k, v))
            return apply_function(_MLSTMGatesCpu, *rows, weight, bias, tuple(row_offsets))
        sources = zip((q, k, v), weight.chunk(3, dim=-1), strict=True)
        products = [grouped_linear(x.to(dtype), w, row_offsets, backend=backend) for x, w in sources]
        sizes = [end - begin for begin, end in pairwise(row_offsets)]
        by_group = (products[0] + products[1] + products[2]).split(sizes)
        gates = torch.cat([rows + own for rows, own in zip(by_group, bias.unbind(0), strict=True)])
        igate, fgate = gates.chunk(2, dim=-1)
        return igate, fgate


def check_gates(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, row_offsets: Sequence[int]) -> None:
    """Raises ValueError for shapes that do not agree."""
    if q.ndim != 2 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k, v must all be [N, C], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    agree = weight.ndim == 3 and weight.shape[1] % 2 == 0 and weight.shape[2] == 3 * q.shape[1]
    if not agree or len(q) != rows or len(weight) != groups or bias.shape != weight.shape[:2]:
        raise ValueError(
            f"q, weight, bias must be [N, C], [E, 2 H, 3 C], [E, 2 H] with N={rows} rows and E={groups} groups, "
            f"got {tuple(q.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )


class _MLSTMGatesCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weight, bias, row_offsets) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k, v))
        weight = weight.contiguous()
        ctx.save_for_backward(q, k, v, weight)
        ctx.row_offsets = row_offsets
        return torch.ops.moxe.mlstm_gates(q, k, v, weight, bias.contiguous(), row_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, digate: Tensor, dfgate: Tensor):
        dgates = digate.contiguous(), dfgate.contiguous()
        return *torch.ops.moxe.mlstm_gates_backward(*dgates, *ctx.saved_tensors, ctx.row_offsets), None


torch.library.define(
    "moxe::mlstm_gates",
    "(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, int[] row_offsets) -> (Tensor, Tensor)",
)
torch.library.define(
    "moxe::mlstm_gates_backward",
    "(Tensor digate, Tensor dfgate, Tensor q, Tensor k, Tensor v, Tensor weight, int[] row_offsets) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moxe::mlstm_gates")
def _(q, k, v, weight, bias, row_offsets):
    shape = (q.shape[0], weight.shape[1] // 2)
    return weight.new_empty(shape), weight.new_empty(shape)


@torch.library.register_fake("moxe::mlstm_gates_backward")
def _(digate, dfgate, q, k, v, weight, row_offsets):
    return *(q.new_empty(q.shape) for _ in range(3)), torch.empty_like(weight), weight.new_empty(weight.shape[:2])
