"""Gating against its equations, row by row.

Legend: N rows, F width, C channels, H heads, E groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moxe.ops.gating import gated_silu, mlstm_output
from tests.tolerances import assert_close

EPS = 1e-3
NAMES = ("y", "gradient of h", "gradient of convolved", "gradient of gate", "gradient of norm_weight", "... of skip")
ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 4, 5, 5, 140, 140),
}
# Heads that fill no vector, exactly some vectors, or some vectors and a part of one.
CHANNELS_AND_HEADS = [(5, 1), (12, 3), (64, 2), (74, 2)]

every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)
every_size = pytest.mark.parametrize(("channels", "heads"), CHANNELS_AND_HEADS)
on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
exact_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def silu_by_equation(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gated_silu_by_halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return silu_by_equation(x[:, :half]) * x[:, half:]


def mlstm_output_by_row(
    h: Tensor, convolved: Tensor, gate: Tensor, norm_weight: Tensor, skip: Tensor, *, row_offsets, heads: int
) -> Tensor:
    rows = []
    for e in range(len(skip)):
        for n in range(row_offsets[e], row_offsets[e + 1]):
            parts = h[n].chunk(heads)
            normed = torch.cat([(part - part.mean()) / (part.var(correction=0) + EPS).sqrt() for part in parts])
            rows.append((normed * norm_weight[e] + skip[e] * convolved[n]) * silu_by_equation(gate[n]))
    return torch.stack(rows) if rows else h * 1


def draw_halves(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    x = 3 * torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [x.to(dtype).requires_grad_()]


def draw_output(row_offsets: tuple[int, ...], channels: int, dtype: torch.dtype) -> list[Tensor]:
    """h, convolved, gate [N, C], norm_weight and skip [E, C]; parameters are float32 beside activations of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    leaves = [torch.randn(n, channels, generator=generator, dtype=torch.float64) for n in (*3 * [rows], groups, groups)]
    of_parameters = torch.promote_types(dtype, torch.float32)
    dtypes = 3 * [dtype] + 2 * [of_parameters]
    return [leaf.to(dtype).requires_grad_() for leaf, dtype in zip(leaves, dtypes, strict=True)]


def output_and_gradients(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = run(*leaves)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    unused = 0 * sum(leaf.sum() for leaf in leaves)  # no rows: a gradient of zero, not of None
    return [y, *torch.autograd.grad((y * dy).sum() + unused, leaves)]


def check(run: Callable[..., Tensor], oracle: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual, expected = output_and_gradients(run, leaves), output_and_gradients(oracle, doubles)
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        assert_close(a, e, "gating", name)


def check_output(row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype, backend: str) -> None:
    sizes = {"row_offsets": row_offsets, "heads": heads}
    run = partial(mlstm_output, **sizes, eps=EPS, backend=backend)
    check(run, partial(mlstm_output_by_row, **sizes), draw_output(row_offsets, channels, dtype))


@exact_dtypes
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (1, 1), (5, 16), (140, 37)])
def test_gated_silu_and_its_gradient_are_those_of_the_equation(rows: int, width: int, dtype: torch.dtype, backend: str):
    check(partial(gated_silu, backend=backend), gated_silu_by_halves, draw_halves(rows, width, dtype))


@exact_dtypes
@every_grouping
@every_size
def test_mlstm_output_and_its_gradients_are_those_of_the_equation_row_by_row(
    row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype, backend: str
):
    check_output(row_offsets, channels, heads, dtype, backend)


@on_cpu
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 16), (140, 37)])
def test_gated_silu_of_bfloat16_is_computed_in_float32_and_rounded_once(rows: int, width: int, backend: str):
    check(partial(gated_silu, backend=backend), gated_silu_by_halves, draw_halves(rows, width, torch.bfloat16))


@on_cpu
@every_grouping
@every_size
def test_mlstm_output_of_bfloat16_is_computed_in_float32_and_rounded_once(
    row_offsets: tuple[int, ...], channels: int, heads: int, backend: str
):
    check_output(row_offsets, channels, heads, torch.bfloat16, backend)


@pytest.mark.usefixtures("poisoned_memory")
@every_grouping
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], backend: str):
    check_output(row_offsets, 74, 2, torch.float32, backend)
    check(partial(gated_silu, backend=backend), gated_silu_by_halves, draw_halves(row_offsets[-1], 37, torch.float32))


def test_gradients_are_those_of_finite_differences(backend: str):
    row_offsets = (0, 0, 3, 4)
    run = partial(mlstm_output, row_offsets=row_offsets, heads=2, eps=EPS, backend=backend)
    assert torch.autograd.gradcheck(run, draw_output(row_offsets, 6, torch.float64))
    assert torch.autograd.gradcheck(partial(gated_silu, backend=backend), draw_halves(3, 2, torch.float64))


@pytest.mark.parametrize("gate", [-200.0, -88.0, 0.0, 88.0, 200.0])
def test_gates_far_from_zero_are_shut_or_open(gate: float, backend: str):
    x = torch.tensor([[gate, 2.0]], requires_grad=True)
    y = gated_silu(x, backend=backend)
    y.backward()
    assert y.item() == pytest.approx(max(gate, 0.0) * 2, abs=1e-30)
    assert x.grad is not None
    slope = {0.0: 0.5}.get(gate, float(gate > 0))
    assert x.grad.tolist() == [pytest.approx([2 * slope, max(gate, 0.0)], abs=1e-30)]


def test_rows_may_lie_apart_and_gradients_be_expanded(backend: str):
    row_offsets = (0, 2, 5)
    leaves = draw_output(row_offsets, 74, torch.float64)
    run = partial(mlstm_output, row_offsets=row_offsets, heads=2, eps=EPS, backend=backend)
    expected = [run(*leaves), *torch.autograd.grad(run(*leaves), leaves, torch.ones_like(leaves[0]))]
    for lay_out in (lambda x: torch.cat([x, x], 1).chunk(2, dim=1)[1], lambda x: x.T.contiguous().T):
        y = run(*(lay_out(leaf) for leaf in leaves[:3]), *leaves[3:])
        for actual, right in zip([y, *torch.autograd.grad(y.sum(), leaves)], expected, strict=True):
            assert_close(actual, right, "gating")
    (x,) = draw_halves(5, 37, torch.float64)
    half = torch.cat([x, x], 1).chunk(2, dim=1)[1]
    (expected_gradient,) = torch.autograd.grad(gated_silu(x, backend=backend), x, torch.ones(5, 37).double())
    assert_close(torch.autograd.grad(gated_silu(half, backend=backend).sum(), x)[0], expected_gradient, "gating")


@pytest.mark.parametrize("poisoned", [0, 1, 2], ids=["h", "convolved", "gate"])
def test_a_nan_stays_in_its_row(poisoned: int, backend: str):
    leaves = draw_output((0, 3), 74, torch.float32)
    run = partial(mlstm_output, row_offsets=(0, 3), heads=2, eps=EPS, backend=backend)
    sound = output_and_gradients(run, leaves)
    with torch.no_grad():
        leaves[poisoned][1, 73] = torch.nan
    actual = output_and_gradients(run, leaves)
    assert actual[0][1, 73].isnan()
    for a, s in zip(actual[:4], sound[:4], strict=True):
        assert a[[0, 2]].equal(s[[0, 2]])
    assert actual[1][1, 37:].isnan().all() or poisoned == 1
    assert actual[4][0, 73].isnan() or poisoned == 1
    assert actual[5][0, 73].isnan() or poisoned == 0


def test_a_nan_in_either_half_reaches_the_gated_output(backend: str):
    x = torch.zeros(3, 74)
    x[0, 36], x[1, 73] = torch.nan, torch.nan
    y = gated_silu(x, backend=backend)
    assert y.isnan().nonzero().tolist() == [[0, 36], [1, 36]]


@on_cpu
def test_the_number_of_threads_changes_no_bit(backend: str):
    leaves = draw_output((0, 150, 400), 74, torch.float32)
    run = partial(mlstm_output, row_offsets=(0, 150, 400), heads=2, eps=EPS, backend=backend)
    alone = output_and_gradients(run, leaves)
    torch.set_num_threads(2)
    try:
        shared = output_and_gradients(run, leaves)
    finally:
        torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(alone, shared, strict=True))


@on_cpu
def test_autocast_gives_what_projections_read_and_gradients_in_the_dtype_of_the_inputs(backend: str):
    row_offsets = (0, 2, 5)
    leaves = draw_output(row_offsets, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlstm_output(*leaves, row_offsets, heads=3, eps=EPS, backend=backend)
    assert y.dtype == torch.bfloat16
    doubles = [leaf.detach().double() for leaf in leaves]
    assert_close(y, mlstm_output_by_row(*doubles, row_offsets=row_offsets, heads=3), "gating")
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_activations_of_unequal_dtypes_are_read_in_the_wider_one(backend: str):
    row_offsets = (0, 2, 5)
    leaves = draw_output(row_offsets, 12, torch.float32)
    inputs = [leaves[0], leaves[1].bfloat16(), *leaves[2:]]
    y = mlstm_output(*inputs, row_offsets, heads=3, eps=EPS, backend=backend)
    assert y.dtype == torch.float32
    doubles = [leaf.detach().double() for leaf in inputs]
    assert_close(y, mlstm_output_by_row(*doubles, row_offsets=row_offsets, heads=3), "gating")


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_raw_ops_have_true_schemas_and_shapes(dtype: torch.dtype, backend: str):
    only = ("test_schema", "test_faketensor")
    row_offsets, inputs = (0, 2, 5), [leaf.detach() for leaf in draw_output((0, 2, 5), 12, dtype)]
    forward = (*inputs, row_offsets, 3, EPS, torch.bfloat16)
    torch.library.opcheck(torch.ops.moxe.mlstm_output, forward, test_utils=only)
    y, statistics = torch.ops.moxe.mlstm_output(*forward)
    backward = (y, *inputs, statistics, row_offsets, 3)
    torch.library.opcheck(torch.ops.moxe.mlstm_output_backward, backward, test_utils=only)
    x = draw_halves(5, 6, dtype)[0].detach()
    torch.library.opcheck(torch.ops.moxe.gated_silu, (x,), test_utils=only)
    torch.library.opcheck(torch.ops.moxe.gated_silu_backward, (x[:, :6], x), test_utils=only)


# torch.compile itself does what this warning is about when it follows an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_function_gives_the_same(backend: str):
    leaves = draw_output((0, 2, 5), 12, torch.float64)
    output = partial(mlstm_output, row_offsets=(0, 2, 5), heads=3, eps=EPS, backend=backend)

    def run(*leaves: Tensor) -> Tensor:
        return gated_silu(output(*leaves).square(), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    actual, expected = (output_and_gradients(of, leaves) for of in (compiled, run))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, "gating", name)


def test_meta_tensors_pass_through():
    leaves = [leaf.to("meta") for leaf in draw_output((0, 2, 5), 12, torch.float32)]
    y = mlstm_output(*leaves, (0, 2, 5), heads=3, eps=EPS)
    assert y.device.type == "meta"
    assert y.shape == (5, 12)
    assert gated_silu(leaves[0]).shape == (5, 6)


def test_shapes_that_do_not_agree_are_refused_with_the_sizes():
    h, parameter = torch.zeros(5, 4), torch.zeros(2, 4)
    options = {"row_offsets": (0, 2, 5), "heads": 2, "eps": EPS}
    with pytest.raises(ValueError, match=re.escape("(5, 3)")):
        mlstm_output(h, torch.zeros(5, 3), h, parameter, parameter, **options)
    with pytest.raises(ValueError, match=re.escape("(1, 4)")):
        mlstm_output(h, h, h, parameter, torch.zeros(1, 4), **options)
    with pytest.raises(ValueError, match=re.escape("(3, 4)")):
        mlstm_output(h, h, h, torch.zeros(3, 4), parameter, **options)
    with pytest.raises(ValueError, match=re.escape("(5, 3)")):
        gated_silu(torch.zeros(5, 3))
