"""Products of consecutive groups of rows with one weight set a group.

Legend: N rows, E groups, I inputs, O outputs, Q blocks.

`row_offsets` (E + 1 host numbers) say which rows belong to a group: an expert's tokens, or all rows of a mixer (E = 1).
A group without rows costs nothing and gets a gradient of zero. Under autocast the products run in its dtype; those in
C++ (`grouped_linear.cpp`) store rows in it, and leave the weights and the sums as precise as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moxe.ops.backend import apply_function, core_dtype, resolve_backend
from moxe.ops.grouped_matmul import grouped_matmul, grouped_outer_, groups_with_rows, multiplies_in_cpp, sum_dtype

# At most so many rows go through products that do nothing but read the weights; more are worth a matrix product.
FEW_ROWS = 8


def grouped_linear(x: Tensor, weight: Tensor, row_offsets: Sequence[int], *, backend: str = "auto") -> Tensor:
    """y[rows of e] = x[rows of e] @ weight[e].T for x [N, I] and weight [E, O, I] -> [N, O].

    Args:
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Raises:
        ValueError: for shapes that do not agree, dtypes that differ outside autocast, or an unknown backend.
    """
    if weight.ndim != 3 or len(weight) != len(row_offsets) - 1 or x.shape != (row_offsets[-1], weight.shape[2]):
        raise ValueError(f"x must be [N, I] and weight [E, O, I] {_sizes(x, weight, row_offsets)}")
    is_cpu = resolve_backend(backend, x.device.type) == "cpu"
    if is_cpu and len(x) <= FEW_ROWS and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return torch.ops.moxe.few_rows_linear(x, weight.contiguous(), row_offsets)
    if x.dtype != weight.dtype and not _under_autocast(x):
        raise ValueError(f"x and weight must have one dtype outside autocast, got {x.dtype} and {weight.dtype}")
    x = _autocast(x)
    in_cpp = multiplies_in_cpp(backend, x.device.type, x.dtype, *weight.shape[1:])
    return apply_function(_GroupedLinear, x, weight, tuple(row_offsets), in_cpp)


def grouped_block_linear(x: Tensor, weight: Tensor, row_offsets: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Block-diagonal products: x [N, Q, I] with weight [E, Q, I, O] -> [N, Q, O].

    Args:
        backend: `auto` or one of `moxe.ops.backend.BACKENDS`.

    Raises:
        ValueError: for shapes that do not agree or an unknown backend.
    """
    if weight.ndim != 4 or len(weight) != len(row_offsets) - 1 or x.shape != (row_offsets[-1], *weight.shape[1:3]):
        raise ValueError(f"x must be [N, Q, I] and weight [E, Q, I, O] {_sizes(x, weight, row_offsets)}")
    if resolve_backend(backend, x.device.type) == "cpu":
        x = _autocast(x)
        return apply_function(_GroupedBlockLinearCpu, x, weight.to(core_dtype(x)), tuple(row_offsets))
    x = _autocast(x)
    return apply_function(_GroupedBlockLinear, x, weight.to(x.dtype), tuple(row_offsets))


def _sizes(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> str:
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    return f"with N={rows} rows and E={groups} groups, got {tuple(x.shape)}, {tuple(weight.shape)}"


def _under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)) if _under_autocast(x) else x


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row_offsets: tuple[int, ...], in_cpp: bool) -> Tensor:
        # Torch's products want the weights cast; both passes can share that.
        matrix = weight if in_cpp else weight.to(x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.weight_dtype, ctx.row_offsets, ctx.in_cpp = weight.dtype, row_offsets, in_cpp
        return grouped_matmul(x, matrix, row_offsets, in_cpp=in_cpp)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, matrix = ctx.saved_tensors
        row_offsets, in_cpp = ctx.row_offsets, ctx.in_cpp
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dx = grouped_matmul(dy, matrix, row_offsets, transposed=True, in_cpp=in_cpp) if needs_dx else None
        if not needs_dweight:
            return dx, None, None, None
        dweight = torch.empty_like(matrix, dtype=sum_dtype(x.dtype, in_cpp))
        return dx, grouped_outer_(dy, x, row_offsets, dweight, in_cpp=in_cpp).to(ctx.weight_dtype), None, None


class _GroupedBlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row_offsets: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.row_offsets = row_offsets
        y = x.new_empty(*x.shape[:2], weight.shape[3])
        for e, rows in groups_with_rows(row_offsets):
            y[rows] = torch.bmm(x[rows].transpose(0, 1), weight[e]).transpose(0, 1)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dweight = torch.zeros_like(weight) if needs_dweight else None
        for e, rows in groups_with_rows(ctx.row_offsets):
            by_block = dy[rows].transpose(0, 1)
            if dx is not None:
                dx[rows] = torch.bmm(by_block, weight[e].mT).transpose(0, 1)
            if dweight is not None:
                torch.bmm(x[rows].permute(1, 2, 0), by_block, out=dweight[e])
        return dx, dweight, None


class _GroupedBlockLinearCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row_offsets: tuple[int, ...]) -> Tensor:
        if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
            x = x.contiguous()
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.row_offsets = row_offsets
        return torch.ops.moxe.grouped_block_linear(x, weight, row_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx, dweight = torch.ops.moxe.grouped_block_linear_backward(
            dy.contiguous(), x, weight, ctx.row_offsets, needs_dx, needs_dweight
        )
        return dx if needs_dx else None, dweight if needs_dweight else None, None


torch.library.define("moxe::grouped_block_linear", "(Tensor x, Tensor weight, int[] row_offsets) -> Tensor")
torch.library.define("moxe::few_rows_linear", "(Tensor x, Tensor weight, int[] row_offsets) -> Tensor")
torch.library.define(
    "moxe::grouped_block_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, int[] row_offsets, bool needs_dx, bool needs_dweight) -> (Tensor, Tensor)",
)


@torch.library.register_fake("moxe::few_rows_linear")
def _(x, weight, row_offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("moxe::grouped_block_linear")
def _(x, weight, row_offsets):
    return x.new_empty(*x.shape[:2], weight.shape[3])


@torch.library.register_fake("moxe::grouped_block_linear_backward")
def _(dy, x, weight, row_offsets, needs_dx, needs_dweight):
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, torch.empty_like(weight) if needs_dweight else weight.new_empty(0)
