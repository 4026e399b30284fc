"""Grouped matrix products against a loop over groups, in torch and in C++, whatever the processor would choose.

Legend: N rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moxe.ops import cross_entropy
from moxe.ops.cpu import build
from moxe.ops.grouped_linear import grouped_linear
from moxe.ops.grouped_matmul import Matrices, grouped_matmul, grouped_outer_, multiplies_in_cpp, sum_dtype
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
    """Of the dtype that sums over rows of `dtype` have; for rows of bfloat16, numbers that it holds exactly."""
    shape = (len(row_offsets) - 1, outputs, inputs)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    return weight.to(sum_dtype(dtype, in_cpp))


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


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_lie_apart_and_begin_anywhere(dtype: torch.dtype, first: int, rows: int, in_cpp: bool):
    row_offsets = (0, rows // 2, rows)
    wide = draw(row_offsets, 21, dtype, 0)
    weight = draw_matrices(row_offsets, 6, 10, dtype, in_cpp)
    x, dy = wide[:, first : first + 6], wide[:, 1:5]
    alike = x.clone(memory_format=torch.contiguous_format), dy.clone(memory_format=torch.contiguous_format)
    expected = grouped_matmul(alike[0], weight, row_offsets, in_cpp=in_cpp)
    assert_close(grouped_matmul(x, weight, row_offsets, in_cpp=in_cpp), expected, "grouped_linear", "y")
    total = torch.empty(2, 4, 6, dtype=weight.dtype)
    expected = grouped_outer_(alike[1], alike[0], row_offsets, total.clone(), in_cpp=in_cpp)
    assert_close(grouped_outer_(dy, x, row_offsets, total, in_cpp=in_cpp), expected, "grouped_linear", "sums")


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_gradient_of_one_number_repeated_is_taken(rows: int, backend: str):
    """`y.sum()` sends back rows without strides."""
    x = draw((0, rows), 6, torch.float32, 0).requires_grad_()
    weight = torch.ones(1, 1, 6, requires_grad=True)
    grouped_linear(x, weight, (0, rows), backend=backend).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.equal(torch.ones(rows, 6))
    assert_close(weight.grad[0, 0], x.detach().double().sum(0), "grouped_linear")


def test_matrices_are_ready_for_any_number_of_products(in_cpp: bool):
    """In the rows' precision or, for C++, in float32 that is rounded to it."""
    x = draw((0, 50), 8, torch.bfloat16, 0)
    exact = draw_matrices((0, 50), 8, 70, torch.bfloat16, False)
    for weight in (exact, exact.float()):
        matrices = Matrices(weight, torch.bfloat16, (0, 50), in_cpp=in_cpp)
        for part in x.split(20):
            expected = part.double() @ exact[0].double().T
            assert_close(matrices.multiply(part, (0, len(part))), expected, "grouped_linear", "y")


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


def test_the_processor_decides_which_products_run_in_cpp():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        pytest.skip("this system does not say what its processor is")
    flags = set(processor.split())
    assert multiplies_in_cpp("cpu", "cpu", torch.float32) == ("AuthenticAMD" in flags and "avx" in flags)
    pairs = "avx512_bf16" in flags and "amx_bf16" not in flags
    assert multiplies_in_cpp("cpu", "cpu", torch.bfloat16) == pairs


def test_pairs_of_bfloat16_need_even_rows_and_other_backends_need_no_cpp():
    assert not multiplies_in_cpp("torch", "cpu", torch.bfloat16, 64)
    assert not multiplies_in_cpp("reference", "cpu", torch.float32, 64)
    if reason := build.why_unavailable():
        pytest.skip(reason)
    assert not multiplies_in_cpp("cpu", "cpu", torch.bfloat16, 64, 33)
    assert not multiplies_in_cpp("cpu", "cpu", torch.float16, 64)


@pytest.fixture
def always_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor would choose."""
    if reason := build.why_unavailable():
        pytest.skip(reason)
    for module in ("grouped_linear", "cross_entropy"):
        monkeypatch.setattr(f"moxe.ops.{module}.multiplies_in_cpp", lambda *arguments: True)


@pytest.mark.usefixtures("always_in_cpp")
def test_under_autocast_the_gradients_of_weights_stay_in_float32():
    x = draw((0, 3, 40), 32, torch.bfloat16, 0).float().requires_grad_()
    weight = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, (0, 3, 40))
    assert y.dtype == torch.bfloat16
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(2))
    dx, dweight = torch.autograd.grad(y, [x, weight], dy.to(y.dtype))
    expected = torch.stack([dy[rows].double().T @ x[rows].double() for _, rows in by_group((0, 3, 40))])
    assert_close(dweight, expected, "grouped_linear")  # float32's bound
    exact = torch.cat([dy[rows].double() @ weight[e].double() for e, rows in by_group((0, 3, 40))])
    assert_close(dx, exact, "grouped_linear", computed_in=torch.bfloat16)


@pytest.mark.usefixtures("always_in_cpp")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_head_in_cpp_has_the_loss_and_gradients_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "_ENTRIES_AT_ONCE", 33 * 10)
    hidden, weight = (draw((0, n), 6, dtype, n).requires_grad_() for n in (25, 33))
    targets = torch.arange(25) % 7
    targets[3] = cross_entropy.IGNORED
    loss = cross_entropy.linear_cross_entropy(hidden, weight, targets, backend="cpu")
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    actual = loss, *torch.autograd.grad(loss, [hidden, weight])
    for a, e in zip(actual, (expected, *torch.autograd.grad(expected, [hidden, weight])), strict=True):
        assert_close(a, e.double(), "model")


# torch.compile itself does what this warning is about when it follows an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("always_in_cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_function_gives_the_same(dtype: torch.dtype):
    """One graph, through the fake kernels; `aot_eager` needs no C compiler."""
    x = draw((0, 3, 40), 32, dtype, 0).requires_grad_()
    weight = draw_matrices((0, 3, 40), 32, 6, dtype, False).requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(x, weight, (0, 3, 40)).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight)
    gradients = (torch.autograd.grad(value, [x, weight]) for value in (compiled, loss(x, weight)))
    for a, e in zip(*gradients, strict=True):
        assert a.equal(e)


def test_dtypes_that_differ_are_refused_outside_autocast(backend: str):
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64"):
        grouped_linear(torch.ones(20, 4), torch.ones(1, 3, 4, dtype=torch.float64), (0, 20), backend=backend)


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    x, dy, weight = torch.ones(7, 6).bfloat16(), torch.ones(7, 4).bfloat16(), torch.ones(2, 4, 6)
    for rows, transposed in ((x, False), (dy, True)):
        pack = (weight, rows.dtype, [0, 3, 7], transposed)
        torch.library.opcheck(torch.ops.moxe.pack_matrices, pack, test_utils=("test_schema", "test_faketensor"))
        packed = torch.ops.moxe.pack_matrices(*pack)
        torch.library.opcheck(torch.ops.moxe.multiply_packed, (rows, packed, [0, 3, 7], 4 if rows is x else 6))
    torch.library.opcheck(torch.ops.moxe.grouped_outer_, (dy, x, [0, 3, 7], weight, True))
