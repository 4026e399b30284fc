"""Layer normalisation without bias of consecutive groups of rows, each group with its own weights.

Legend: N rows, C channels, H heads of C / H channels, E groups (weight sets: experts, or 1 for a mixer).

    y = w_e (x - mean) / sqrt(variance + eps), mean and variance over each head of a row

`row_offsets` (E + 1 host numbers) say which rows belong to a group; a group may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moxe.ops.backend import apply_function, autocast_dtype, core_dtype, resolve_backend


def stacked_layer_norm(
    x: Tensor, weight: Tensor, row_offsets: Sequence[int], *, heads: int = 1, eps: float, backend: str = "auto"
) -> Tensor:
    """Normalises each of `heads` parts of every row of x [N, C] and scales it by its group's row of weight [E, C].

    Args:
        eps: is added to the variance.
        backend: `auto`, `cpu` or `torch`; `reference` is `torch` here.

    Returns:
        [N, C]. The C++ gives the dtype of x, and bfloat16 under an autocast to it, since projections read the result.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    check_channels(x, weight, row_offsets, heads)
    if resolve_backend(backend, x.device.type) == "cpu":
        dtype = autocast_dtype(x)
        return apply_function(_StackedLayerNorm, x, weight.to(core_dtype(x)), tuple(row_offsets), heads, eps, dtype)
    return stacked_scale(head_norm(x, heads, eps), weight, row_offsets)


def check_channels(x: Tensor, weight: Tensor, row_offsets: Sequence[int], heads: int) -> None:
    """Raises ValueError unless x is [N, C], weight [E, C] and C a multiple of the heads."""
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    if x.ndim != 2 or len(x) != rows or weight.shape != (groups, x.shape[1]) or x.shape[1] % heads:
        raise ValueError(
            f"x must be [N, C] and weight [E, C] with N={rows} rows, E={groups} groups and C a multiple of "
            f"{heads} heads, got {tuple(x.shape)}, {tuple(weight.shape)}"
        )


def head_norm(x: Tensor, heads: int, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) of each of `heads` parts of the rows of x [N, C]."""
    size = x.shape[-1] // heads
    return F.layer_norm(x.unflatten(-1, (heads, size)), (size,), eps=eps).flatten(-2)


def stacked_scale(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> Tensor:
    """Each row of x [N, C] times its group's row of weight [E, C]."""
    if len(weight) == 1:
        return x * weight[0]
    sizes = [end - begin for begin, end in pairwise(row_offsets)]
    return torch.cat([part * own for part, own in zip(x.split(sizes), weight.unbind(0), strict=True)])


class _StackedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, row_offsets: tuple[int, ...], heads: int, eps: float, dtype: torch.dtype) -> Tensor:
        y, statistics = torch.ops.moxe.stacked_layer_norm(x, weight, row_offsets, heads, eps, dtype)
        ctx.save_for_backward(x, weight, statistics)
        ctx.row_offsets, ctx.heads = row_offsets, heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, statistics = ctx.saved_tensors
        dx, dweight = torch.ops.moxe.stacked_layer_norm_backward(dy, x, weight, statistics, ctx.row_offsets, ctx.heads)
        return dx, dweight, None, None, None, None


# The implementations are those of norm.cpp.
torch.library.define(
    "moxe::stacked_layer_norm",
    "(Tensor x, Tensor weight, int[] row_offsets, int heads, float eps, ScalarType dtype) -> (Tensor, Tensor)",
)
torch.library.define(
    "moxe::stacked_layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor statistics, int[] row_offsets, int heads) -> (Tensor, Tensor)",
)


@torch.library.register_fake("moxe::stacked_layer_norm")
def _(x, weight, row_offsets, heads, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], heads, 2, dtype=core_dtype(x))


@torch.library.register_fake("moxe::stacked_layer_norm_backward")
def _(dy, x, weight, statistics, row_offsets, heads):
    return x.new_empty(x.shape), torch.empty_like(weight)
