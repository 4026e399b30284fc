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
    return _library_has_fast_matmul(dtype)


@cache
def _library_has_fast_matmul(dtype: torch.dtype) -> bool:
    return torch.ops.moxe.has_fast_matmul(dtype)


def sum_dtype(rows: torch.dtype, in_cpp: bool) -> torch.dtype:
    """The dtype that `grouped_outer_` of rows of a dtype sums up in."""
    return torch.promote_types(rows, torch.float32) if in_cpp else rows


class Matrices:
    """One matrix a group, made ready for products with rows of a dtype: of use where there are several products.

    Args:
        weight: [E, O, I]; cast to the dtype of the rows, by the C++ as it packs where that is bfloat16.
        rows: the dtype of the rows.
        row_offsets: says which groups will have rows.
        transposed: for products with weight[e] instead of weight[e].T.
    """

    def __init__(
        self, weight: Tensor, rows: torch.dtype, row_offsets: Sequence[int], *, transposed: bool = False, in_cpp: bool
    ) -> None:
        self.in_cpp, self.transposed = in_cpp, transposed
        self.columns = weight.shape[2 if transposed else 1]
        if in_cpp:
            readable = (rows, torch.float32) if rows == torch.bfloat16 else (rows,)
            weight = weight if weight.dtype in readable else weight.to(rows)
            self.matrices = torch.ops.moxe.pack_matrices(weight.contiguous(), rows, row_offsets, transposed)
        else:
            self.matrices = weight.to(rows)

    def multiply(self, x: Tensor, row_offsets: Sequence[int]) -> Tensor:
        """y[rows of e] = x[rows of e] @ weight[e].T, or @ weight[e] if transposed, in the dtype of x.

        Args:
            x: [N, I], or [N, O] if transposed.
            row_offsets: may differ from that of the constructor, but no further group may have rows.
        """
        if self.in_cpp:
            return torch.ops.moxe.multiply_packed(x, self.matrices, row_offsets, self.columns)
        y = x.new_empty(len(x), self.columns)
        for e, rows in groups_with_rows(row_offsets):
            torch.mm(x[rows], self.matrices[e] if self.transposed else self.matrices[e].T, out=y[rows])
        return y


def grouped_matmul(
    x: Tensor, weight: Tensor, row_offsets: Sequence[int], *, transposed: bool = False, in_cpp: bool
) -> Tensor:
    """One product of `Matrices`."""
    return Matrices(weight, x.dtype, row_offsets, transposed=transposed, in_cpp=in_cpp).multiply(x, row_offsets)


def grouped_outer_(
    dy: Tensor, x: Tensor, row_offsets: Sequence[int], total: Tensor, *, add: bool = False, in_cpp: bool
) -> Tensor:
    """total[e] = dy[rows of e].T @ x[rows of e], or that is added if `add`; 0 (or nothing) for a group without rows.

    Args:
        dy, x: [N, O] and [N, I] in one dtype.
        total: [E, O, I] in `sum_dtype`; it is overwritten and returned.
    """
    if in_cpp:
        torch.ops.moxe.grouped_outer_(dy, x, row_offsets, total, add)
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


# The implementations are those of grouped_matmul.cpp.
torch.library.define("moxe::has_fast_matmul", "(ScalarType stored) -> bool")
torch.library.define(
    "moxe::pack_matrices", "(Tensor weight, ScalarType rows, int[] row_offsets, bool transposed) -> Tensor"
)
torch.library.define("moxe::multiply_packed", "(Tensor x, Tensor packed, int[] row_offsets, int columns) -> Tensor")
torch.library.define("moxe::columns_of_panel", "(ScalarType rows) -> int")
torch.library.define(
    "moxe::grouped_outer_", "(Tensor dy, Tensor x, int[] row_offsets, Tensor(a!) total, bool add) -> ()"
)


@torch.library.register_fake("moxe::pack_matrices")
def _(weight, rows, row_offsets, transposed):
    groups, *sizes = weight.shape
    columns, terms = reversed(sizes) if transposed else sizes
    panel = torch.ops.moxe.columns_of_panel(rows)
    numbers = -(-terms // 2) * 2 if rows == torch.bfloat16 else terms
    shape = (groups, -(-columns // panel), numbers * panel * rows.itemsize)
    return weight.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("moxe::multiply_packed")
def _(x, packed, row_offsets, columns):
    return x.new_empty(x.shape[0], columns)


@torch.library.register_fake("moxe::grouped_outer_")
def _(dy, x, row_offsets, total, add):
    return None
