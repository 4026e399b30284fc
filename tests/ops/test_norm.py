"""Layer normalisation by groups against its equation, row by row.

Legend: N rows, C channels, H heads, E groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moxe.ops.norm import stacked_layer_norm
from tests.tolerances import assert_close

EPS = 1e-3
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


def norm_by_row(x: Tensor, weight: Tensor, row_offsets: tuple[int, ...], heads: int) -> Tensor:
    rows = []
    for e, own in enumerate(weight):
        for row in x[row_offsets[e] : row_offsets[e + 1]]:
            parts = row.chunk(heads)
            normed = [(part - part.mean()) / (part.var(correction=0) + EPS).sqrt() for part in parts]
            rows.append(torch.cat(normed) * own)
    return torch.stack(rows) if rows else x * 1


def draw(row_offsets: tuple[int, ...], channels: int, dtype: torch.dtype) -> list[Tensor]:
    """x [N, C], far from zero, and weight [E, C]; parameters are float32 beside activations of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(row_offsets[-1], channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(row_offsets) - 1, channels, generator=generator, dtype=torch.float64)
    of_weight = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype).requires_grad_(), weight.to(of_weight).requires_grad_()]


def output_and_gradients(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = run(*leaves)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    unused = 0 * sum(leaf.sum() for leaf in leaves)  # no rows: a gradient of zero, not of None
    return [y, *torch.autograd.grad((y * dy).sum() + unused, leaves)]


def check_against_rows(
    row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype, backend: str
) -> None:
    leaves = draw(row_offsets, channels, dtype)
    actual = output_and_gradients(
        lambda x, w: stacked_layer_norm(x, w, row_offsets, heads=heads, eps=EPS, backend=backend), leaves
    )
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = output_and_gradients(lambda x, w: norm_by_row(x, w, row_offsets, heads), doubles)
    for name, a, e in zip(("y", "gradient of x", "gradient of weight"), actual, expected, strict=True):
        assert_close(a, e, "norm", name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_grouping
@every_size
def test_outputs_and_gradients_are_those_of_the_equation_row_by_row(
    row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype, backend: str
):
    check_against_rows(row_offsets, channels, heads, dtype, backend)


@on_cpu
@every_grouping
@every_size
def test_bfloat16_rows_are_computed_in_float32_and_rounded_once(
    row_offsets: tuple[int, ...], channels: int, heads: int, backend: str
):
    check_against_rows(row_offsets, channels, heads, torch.bfloat16, backend)


@pytest.mark.usefixtures("poisoned_memory")
@every_grouping
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], backend: str):
    check_against_rows(row_offsets, 74, 2, torch.float32, backend)


def test_gradients_are_those_of_finite_differences(backend: str):
    row_offsets = (0, 0, 3, 4)
    leaves = draw(row_offsets, 6, torch.float64)
    norm = partial(stacked_layer_norm, row_offsets=row_offsets, heads=2, eps=EPS, backend=backend)
    assert torch.autograd.gradcheck(norm, leaves)


def test_rows_may_lie_apart_and_gradients_be_expanded(backend: str):
    row_offsets = (0, 2, 5)
    x, weight = draw(row_offsets, 74, torch.float64)
    half = torch.cat([x, x], 1).chunk(2, dim=1)[1]
    transposed = x.T.contiguous().T
    run = partial(stacked_layer_norm, weight=weight, row_offsets=row_offsets, heads=2, eps=EPS, backend=backend)
    expected = [run(x), *torch.autograd.grad(run(x), [x, weight], torch.ones_like(x))]
    for strided in (half, transposed):
        y = run(strided)
        for actual, right in zip([y, *torch.autograd.grad(y.sum(), [x, weight])], expected, strict=True):
            assert_close(actual, right, "norm")


def test_a_nan_stays_in_its_row(backend: str):
    row_offsets = (0, 3)
    x, weight = draw(row_offsets, 74, torch.float32)
    poisoned = x.detach().clone()
    poisoned[1, 73] = torch.nan
    poisoned.requires_grad_()
    run = partial(stacked_layer_norm, weight=weight, row_offsets=row_offsets, heads=2, eps=EPS, backend=backend)
    y, dx, dweight = output_and_gradients(lambda x, _: run(x), [poisoned, weight])
    sound_y, sound_dx, _ = output_and_gradients(lambda x, _: run(x), [x, weight])
    for actual, sound in ((y, sound_y), (dx, sound_dx)):
        assert actual[1, 37:].isnan().all()
        assert actual[[0, 2]].equal(sound[[0, 2]])
    assert dweight[0, 37:].isnan().all()


def test_a_row_of_one_value_gives_zeros(backend: str):
    """The variance is exactly 0; eps alone stands under the root."""
    x = torch.full((1, 64), 0.5, requires_grad=True)
    y = stacked_layer_norm(x, torch.ones(1, 64), (0, 1), eps=EPS, backend=backend)
    assert y.equal(torch.zeros(1, 64))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@on_cpu
def test_the_number_of_threads_changes_no_bit(backend: str):
    leaves = draw((0, 150, 400), 74, torch.float32)
    run = partial(stacked_layer_norm, row_offsets=(0, 150, 400), heads=2, eps=EPS, backend=backend)
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
    x, weight = draw(row_offsets, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = stacked_layer_norm(x, weight, row_offsets, heads=3, eps=EPS, backend=backend)
    assert y.dtype == torch.bfloat16
    assert_close(y, norm_by_row(x.double(), weight.double(), row_offsets, 3), "norm")
    y.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_raw_ops_have_true_schemas_and_shapes(dtype: torch.dtype, backend: str):
    x, weight = (leaf.detach() for leaf in draw((0, 2, 5), 12, dtype))
    forward = (x, weight, (0, 2, 5), 3, EPS, torch.bfloat16)
    only = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moxe.stacked_layer_norm, forward, test_utils=only)
    y, statistics = torch.ops.moxe.stacked_layer_norm(*forward)
    backward = (y, x, weight, statistics, (0, 2, 5), 3)
    torch.library.opcheck(torch.ops.moxe.stacked_layer_norm_backward, backward, test_utils=only)


# torch.compile itself does what this warning is about when it follows an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_function_gives_the_same(backend: str):
    leaves = draw((0, 2, 5), 12, torch.float64)
    run = partial(stacked_layer_norm, row_offsets=(0, 2, 5), heads=3, eps=EPS, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: run(x, w).square(), backend="aot_eager", fullgraph=True)
    actual, expected = (output_and_gradients(of, leaves) for of in (compiled, lambda x, w: run(x, w).square()))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "norm")


def test_meta_tensors_pass_through():
    x, weight = (leaf.to("meta") for leaf in draw((0, 2, 5), 12, torch.float32))
    y = stacked_layer_norm(x, weight, (0, 2, 5), heads=3, eps=EPS)
    assert y.device.type == "meta"
    assert y.shape == x.shape


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "heads", "named"),
    [
        ((5, 4), (2, 3), 1, "(2, 3)"),
        ((5, 4), (1, 4), 1, "(1, 4)"),
        ((6, 4), (2, 4), 1, "(6, 4)"),
        ((5, 4), (2, 4), 3, "3 heads"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], heads: int, named: str
):
    with pytest.raises(ValueError, match=re.escape(named)):
        stacked_layer_norm(torch.zeros(x_shape), torch.zeros(weight_shape), (0, 2, 5), heads=heads, eps=EPS)
