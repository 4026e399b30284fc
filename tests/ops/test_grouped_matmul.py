"""Grouped matrix products against a loop over groups, in torch and in C++, whatever the processor would choose.

Legend: N rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moxe.ops.cpu import build
from moxe.ops.grouped_linear import grouped_linear
from moxe.ops.grouped_matmul import grouped_matmul, grouped_outer_, matrix_dtype, multiplies_in_cpp
from tests.tolerances import assert_close

ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 4, 5, 5, 11, 11),
    "several blocks of rows and of terms": (0, 1030, 1031, 1200),
}
# Sizes below a vector, of exactly one panel, and of several panels and a part of one.
SIZES = [(2, 6), (64, 64), (66, 146)]

every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)
every_size = pytest.mark.parametrize(("inputs", "outputs"), SIZES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def in_cpp(backend: str) -> bool:
    return backend == "cpu"


def draw(row_offsets: tuple[int, ...], width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(row_offsets[-1], width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_matrices(row_offsets: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, in_cpp: bool) -> Tensor:
    """Of the dtype that rows of `dtype` are multiplied with; with rows of bfloat16, numbers that it holds exactly."""
    shape = (len(row_offsets) - 1, outputs, inputs)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    return weight.to(matrix_dtype(dtype, in_cpp))


def by_group(row_offsets: tuple[int, ...]) -> list[tuple[int, slice]]:
    return [(e, slice(begin, end)) for e, (begin, end) in enumerate(pairwise(row_offsets))]


@every_dtype
@every_size
@every_grouping
def test_products_are_those_of_a_loop_over_groups(
    row_offsets: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, in_cpp: bool
):
    x, dy = draw(row_offsets, inputs, dtype, 0), draw(row_offsets, outputs, dtype, 1)
    weight = draw_matrices(row_offsets, inputs, outputs, dtype, in_cpp)
    wide = weight.double()
    groups = by_group(row_offsets)
    y = grouped_matmul(x, weight, row_offsets, in_cpp=in_cpp)
    dx = grouped_matmul(dy, weight, row_offsets, transposed=True, in_cpp=in_cpp)
    assert y.dtype == dx.dtype == dtype
    assert_close(y, torch.cat([x[rows].double() @ wide[e].T for e, rows in groups]), "grouped_linear", "y")
    assert_close(dx, torch.cat([dy[rows].double() @ wide[e] for e, rows in groups]), "grouped_linear", "dx")


@every_dtype
@every_size
@every_grouping
def test_sums_over_rows_are_those_of_a_loop_over_groups(
    row_offsets: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, in_cpp: bool
):
    x, dy = draw(row_offsets, inputs, dtype, 0), draw(row_offsets, outputs, dtype, 1)
    start = draw_matrices(row_offsets, inputs, outputs, dtype, in_cpp)
    sums = torch.stack([dy[rows].double().T @ x[rows].double() for _, rows in by_group(row_offsets)])
    fresh = grouped_outer_(dy, x, row_offsets, torch.full_like(start, torch.nan), in_cpp=in_cpp)
    assert_close(fresh, sums, "grouped_linear", "sums")
    if start.dtype != torch.bfloat16:
        added = grouped_outer_(dy, x, row_offsets, start.clone(), add=True, in_cpp=in_cpp)
        assert_close(added, start.double() + sums, "grouped_linear", "added sums")


def test_rows_may_lie_apart_and_begin_anywhere(in_cpp: bool):
    for dtype in (torch.float32, torch.bfloat16):
        wide = draw((0, 9), 21, dtype, 0)
        weight = draw_matrices((0, 4, 9), 6, 10, dtype, in_cpp)
        for first in (0, 3):
            part = wide[:, first : first + 6]
            expected = grouped_matmul(part.contiguous(), weight, (0, 4, 9), in_cpp=in_cpp)
            actual = grouped_matmul(part, weight, (0, 4, 9), in_cpp=in_cpp)
            assert_close(actual, expected, "grouped_linear", "y")
            total = torch.empty(2, 4, 6, dtype=weight.dtype)
            dy = wide[:, 1:5]
            expected = grouped_outer_(dy.contiguous(), part.contiguous(), (0, 4, 9), total.clone(), in_cpp=in_cpp)
            actual = grouped_outer_(dy, part, (0, 4, 9), total, in_cpp=in_cpp)
            assert_close(actual, expected, "grouped_linear", "sums")


@every_dtype
def test_a_row_depends_on_no_other_and_not_on_its_place(dtype: torch.dtype):
    if reason := build.why_unavailable():
        pytest.skip(reason)
    x = draw((0, 300), 66, dtype, 0)
    weight = draw_matrices((0, 300), 66, 50, dtype, True)
    y = grouped_matmul(x, weight, (0, 300), in_cpp=True)
    for n in (0, 5, 119, 120, 299):
        assert grouped_matmul(x[n : n + 1], weight, (0, 1), in_cpp=True).equal(y[n : n + 1])
    x[7] = torch.nan
    spoiled = grouped_matmul(x, weight, (0, 300), in_cpp=True)
    assert spoiled[7].isnan().all()
    assert torch.cat([spoiled[:7], spoiled[8:]]).equal(torch.cat([y[:7], y[8:]]))


def test_results_are_the_same_with_any_number_of_threads():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    row_offsets = (0, 900, 1500)
    x, dy = draw(row_offsets, 66, torch.bfloat16, 0), draw(row_offsets, 50, torch.bfloat16, 1)
    weight = draw_matrices(row_offsets, 66, 50, torch.bfloat16, True)

    def results() -> tuple[Tensor, Tensor]:
        total = torch.empty_like(weight)
        y = grouped_matmul(x, weight, row_offsets, in_cpp=True)
        return y, grouped_outer_(dy, x, row_offsets, total, in_cpp=True)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        together = results()
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@every_dtype
@every_grouping
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], dtype: torch.dtype, in_cpp: bool):
    x, dy = draw(row_offsets, 10, dtype, 0), draw(row_offsets, 6, dtype, 1)
    weight = draw_matrices(row_offsets, 10, 6, dtype, in_cpp)
    y = grouped_matmul(x, weight, row_offsets, in_cpp=in_cpp)
    assert y.isfinite().all()
    assert grouped_outer_(dy, x, row_offsets, torch.empty_like(weight), in_cpp=in_cpp).isfinite().all()


def test_pairs_of_bfloat16_need_even_rows_and_other_backends_need_no_cpp():
    assert not multiplies_in_cpp("torch", "cpu", torch.bfloat16, 64)
    assert not multiplies_in_cpp("reference", "cpu", torch.float32, 64)
    if reason := build.why_unavailable():
        pytest.skip(reason)
    assert not multiplies_in_cpp("cpu", "cpu", torch.bfloat16, 64, 33)
    assert not multiplies_in_cpp("cpu", "cpu", torch.float16, 64)


@pytest.mark.parametrize("size", [32, 33], ids=["even", "odd"])
def test_a_linear_layer_under_autocast_keeps_the_gradients_of_its_weights_in_float32(size: int, backend: str):
    x = draw((0, 40), size, torch.float32, 0)
    weight = torch.randn(1, 6, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, (0, 40), backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    x, dy, weight = torch.ones(7, 6).bfloat16(), torch.ones(7, 4).bfloat16(), torch.ones(2, 4, 6)
    for rows, transposed in ((x, False), (dy, True)):
        torch.library.opcheck(torch.ops.moxe.grouped_matmul, (rows, weight, [0, 3, 7], transposed))
    torch.library.opcheck(torch.ops.moxe.grouped_outer_, (dy, x, [0, 3, 7], weight, True))
