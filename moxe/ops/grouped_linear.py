"""Products of consecutive groups of rows with one weight set a group.

Legend: N rows, E groups, I inputs, O outputs, Q blocks.

`row_offsets` (E + 1 host numbers) say which rows belong to a group: an expert's tokens, or all rows of a mixer (E = 1).
A group without rows costs nothing and gets a gradient of zero. Under autocast the products run in its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> Tensor:
    """y[rows of e] = x[rows of e] @ weight[e].T for x [N, I] and weight [E, O, I] -> [N, O].

    Raises:
        ValueError: for shapes that do not agree.
    """
    if weight.ndim != 3 or len(weight) != len(row_offsets) - 1 or x.shape != (row_offsets[-1], weight.shape[2]):
        raise ValueError(f"x must be [N, I] and weight [E, O, I] {_sizes(x, weight, row_offsets)}")
    return _GroupedLinear.apply(*_autocast(x, weight), tuple(row_offsets))


def grouped_block_linear(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> Tensor:
    """Block-diagonal products: x [N, Q, I] with weight [E, Q, I, O] -> [N, Q, O].

    Raises:
        ValueError: for shapes that do not agree.
    """
    if weight.ndim != 4 or len(weight) != len(row_offsets) - 1 or x.shape != (row_offsets[-1], *weight.shape[1:3]):
        raise ValueError(f"x must be [N, Q, I] and weight [E, Q, I, O] {_sizes(x, weight, row_offsets)}")
    return _GroupedBlockLinear.apply(*_autocast(x, weight), tuple(row_offsets))


def _sizes(x: Tensor, weight: Tensor, row_offsets: Sequence[int]) -> str:
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    return f"with N={rows} rows and E={groups} groups, got {tuple(x.shape)}, {tuple(weight.shape)}"


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _groups(row_offsets: tuple[int, ...]) -> list[tuple[int, slice]]:
    bounds = pairwise(row_offsets)
    return [(e, slice(start, end)) for e, (start, end) in enumerate(bounds) if end > start]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row_offsets: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.row_offsets = row_offsets
        y = x.new_empty(len(x), weight.shape[1])
        for e, rows in _groups(row_offsets):
            torch.mm(x[rows], weight[e].T, out=y[rows])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dweight = torch.zeros_like(weight) if needs_dweight else None
        for e, rows in _groups(ctx.row_offsets):
            if dx is not None:
                torch.mm(dy[rows], weight[e], out=dx[rows])
            if dweight is not None:
                torch.mm(dy[rows].T, x[rows], out=dweight[e])
        return dx, dweight, None


class _GroupedBlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, row_offsets: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.row_offsets = row_offsets
        y = x.new_empty(*x.shape[:2], weight.shape[3])
        for e, rows in _groups(row_offsets):
            y[rows] = torch.bmm(x[rows].transpose(0, 1), weight[e]).transpose(0, 1)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dweight = torch.zeros_like(weight) if needs_dweight else None
        for e, rows in _groups(ctx.row_offsets):
            by_block = dy[rows].transpose(0, 1)
            if dx is not None:
                dx[rows] = torch.bmm(by_block, weight[e].mT).transpose(0, 1)
            if dweight is not None:
                torch.bmm(x[rows].permute(1, 2, 0), by_block, out=dweight[e])
        return dx, dweight, None
