"""Matrix products of consecutive groups of rows with one matrix a group, and where they run.

Legend: N rows, E groups, I inputs, O outputs.

Plain functions without gradients: `moxe.ops.grouped_linear` and the language-model head build theirs from them. In C++
(`grouped_matmul.cpp`) all groups go through one parallel loop and matrices may stay in float32 while rows are bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from moxe.ops.backend import resolve_backend


def multiplies_in_cpp(backend: str, device_type: str, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether products of rows of a dtype run in C++: with backend `cpu`, and where the processor makes it pay.

    float32 does on AMD, where torch's library takes a slow path; bfloat16 where pairs of it are multiplied at once, but
    not where a matrix unit is better still. The processor alone decides, no timing: a run computes the same every time.

    Args:
        sizes: lengths of rows; pairs of bfloat16 need even ones.
    """
    if resolve_backend(backend, device_type) != "cpu":
        return False
    return _has_fast_matmul(dtype) and not (dtype == torch.bfloat16 and any(size % 2 for size in sizes))


@torch.compiler.assume_constant_result
def _has_fast_matmul(dtype: torch.dtype) -> bool:
    return _asked(dtype)


@cache
def _asked(dtype: torch.dtype) -> bool:
    return torch.ops.moxe.has_fast_matmul(dtype)


def matrix_dtype(rows: torch.dtype, in_cpp: bool) -> torch.dtype:
    """The dtype of the matrices that rows of a dtype are multiplied with."""
    return torch.promote_types(rows, torch.float32) if in_cpp else rows


def grouped_matmul(
    x: Tensor, weight: Tensor, row_offsets: Sequence[int], *, transposed: bool = False, in_cpp: bool
) -> Tensor:
    """y[rows of e] = x[rows of e] @ weight[e].T, or @ weight[e] if `transposed`.

    Args:
        x: [N, I], or [N, O] if `transposed`.
        weight: [E, O, I] in `matrix_dtype`.

    Returns:
        [N, O], or [N, I] if `transposed`, in the dtype of x.
    """
    if in_cpp:
        return torch.ops.moxe.grouped_matmul(_with_dense_rows(x), weight.contiguous(), row_offsets, transposed)
    y = x.new_empty(len(x), weight.shape[2 if transposed else 1])
    for e, rows in groups_with_rows(row_offsets):
        torch.mm(x[rows], weight[e] if transposed else weight[e].T, out=y[rows])
    return y


def grouped_outer_(
    dy: Tensor, x: Tensor, row_offsets: Sequence[int], total: Tensor, *, add: bool = False, in_cpp: bool
) -> Tensor:
    """total[e] = dy[rows of e].T @ x[rows of e], or that is added if `add`; 0 (or nothing) for a group without rows.

    Args:
        dy, x: [N, O] and [N, I] in one dtype.
        total: [E, O, I] in `matrix_dtype`; it is overwritten and returned.
    """
    if in_cpp:
        torch.ops.moxe.grouped_outer_(_with_dense_rows(dy), _with_dense_rows(x), row_offsets, total, add)
        return total
    if not add and len(groups_with_rows(row_offsets)) < len(total):
        total.zero_()
    for e, rows in groups_with_rows(row_offsets):
        if add:
            total[e].addmm_(dy[rows].T, x[rows])
        else:
            torch.mm(dy[rows].T, x[rows], out=total[e])
    return total


def groups_with_rows(row_offsets: Sequence[int]) -> list[tuple[int, slice]]:
    bounds = pairwise(row_offsets)
    return [(e, slice(start, end)) for e, (start, end) in enumerate(bounds) if end > start]


def _with_dense_rows(x: Tensor) -> Tensor:
    pairs_begin_evenly = x.dtype != torch.bfloat16 or not (x.stride(0) % 2 or x.storage_offset() % 2)
    return x if x.stride(1) == 1 and pairs_begin_evenly else x.contiguous()


# The implementations are those of grouped_matmul.cpp.
torch.library.define("moxe::has_fast_matmul", "(ScalarType stored) -> bool")
torch.library.define("moxe::grouped_matmul", "(Tensor x, Tensor weight, int[] row_offsets, bool transposed) -> Tensor")
torch.library.define(
    "moxe::grouped_outer_", "(Tensor dy, Tensor x, int[] row_offsets, Tensor(a!) total, bool add) -> ()"
)


@torch.library.register_fake("moxe::grouped_matmul")
def _(x, weight, row_offsets, transposed):
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@torch.library.register_fake("moxe::grouped_outer_")
def _(dy, x, row_offsets, total, add):
    return None
