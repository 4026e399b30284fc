"""Grouped products against a loop over rows.

Legend: N rows, E groups, I inputs, O outputs, Q blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from moxe.ops.cpu import build
from moxe.ops.grouped_linear import FEW_ROWS, grouped_block_linear, grouped_linear
from tests.oracles import grouped_block_linear_by_loop, grouped_linear_by_loop
from tests.tolerances import assert_close


@dataclass(frozen=True)
class Product:
    op: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
    loop: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
    row_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    autocast_rounds_weights: bool = True


PRODUCTS = {
    "dense": Product(grouped_linear, grouped_linear_by_loop, (3,), (5, 3)),
    "block-diagonal": Product(
        partial(grouped_block_linear, backend="torch"), grouped_block_linear_by_loop, (2, 3), (2, 3, 4)
    ),
    "block-diagonal in C++": Product(
        partial(grouped_block_linear, backend="cpu"), grouped_block_linear_by_loop, (2, 3), (2, 3, 4), False
    ),
}
ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 4, 5, 5, 11, 11),
}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Product:
    if "C++" in request.param and (reason := build.why_unavailable()):
        pytest.skip(reason)
    return PRODUCTS[request.param]


every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)


def draw(product: Product, row_offsets: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row_offsets[-1], *product.row_shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(row_offsets) - 1, *product.weight_shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def check_against_loop(product: Product, row_offsets: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(product, row_offsets, dtype)
    of_loop = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    y, expected = product.op(x, weight, row_offsets), product.loop(of_loop[0], of_loop[1], row_offsets)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, [x, weight], dy.to(dtype))
    loss = (expected * dy).sum() + 0 * sum(leaf.sum() for leaf in of_loop)  # a group without rows: zero, not None
    expected_grads = torch.autograd.grad(loss, of_loop)
    assert_close(y, expected, "grouped_linear", "y")
    for name, grad, expected_grad in zip(("x", "weight"), grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, "grouped_linear", f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_grouping
def test_outputs_and_gradients_match_the_loop(product: Product, row_offsets: tuple[int, ...], dtype: torch.dtype):
    check_against_loop(product, row_offsets, dtype)


@every_grouping
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_ever_read(product: Product, row_offsets: tuple[int, ...]):
    check_against_loop(product, row_offsets, torch.float32)


def test_gradients_are_those_of_finite_differences(product: Product):
    row_offsets = (0, 0, 3, 4, 4)
    leaves = draw(product, row_offsets, torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: product.op(x, weight, row_offsets), leaves)


def test_a_group_without_rows_gets_a_gradient_of_exactly_zero(product: Product):
    row_offsets = (0, 0, 3, 3)
    x, weight = draw(product, row_offsets, torch.float32)
    product.op(x, weight, row_offsets).square().sum().backward()
    assert weight.grad is not None
    assert [bool(grad.any()) for grad in weight.grad] == [False, True, False]


def test_inputs_and_gradients_need_not_be_contiguous(product: Product):
    row_offsets = (0, 2, 5)
    x, weight = draw(product, row_offsets, torch.float64)
    strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in (x, weight)]
    y = product.op(strided[0], strided[1], row_offsets)
    assert_close(y, product.op(x, weight, row_offsets), "grouped_linear", "y")
    expanded = torch.autograd.grad(y.sum(), [x, weight])
    dense = torch.autograd.grad(product.op(x, weight, row_offsets), [x, weight], torch.ones_like(y))
    for actual, expected in zip(expanded, dense, strict=True):
        assert_close(actual, expected, "grouped_linear", "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(3, 5, 37), (9, 16, 16), (2, 70, 33)], ids=str)
def test_blocks_of_any_size_on_rows_that_lie_apart(block: tuple[int, int, int], dtype: torch.dtype, backend: str):
    blocks, inputs, _ = block
    sized = Product(
        partial(grouped_block_linear, backend=backend), grouped_block_linear_by_loop, (2 * blocks, inputs), block
    )
    row_offsets = (0, 0, 101, 105, 105)
    wide, weight = draw(sized, row_offsets, dtype)
    x = wide[:, :blocks]
    half = wide.detach()[:, :blocks].requires_grad_()
    assert not half.is_contiguous()
    of_loop = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    y, expected = sized.op(half, weight, row_offsets), sized.loop(*of_loop, row_offsets)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1))
    assert_close(y, expected, "grouped_linear", "y")
    grads = torch.autograd.grad(y, [half, weight], dy.to(dtype))
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, of_loop, dy.double()), strict=True):
        assert_close(grad, expected_grad, "grouped_linear", "gradient")


def test_weights_sum_their_gradient_over_any_number_of_rows(backend: str):
    row_offsets = (0, 1100, 1101, 1101, 1700)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row_offsets[-1], 3, 4, generator=generator, dtype=torch.float64)
    dy = torch.randn(row_offsets[-1], 3, 5, generator=generator, dtype=torch.float64)
    weight = torch.zeros(4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    (dweight,) = torch.autograd.grad(grouped_block_linear(x, weight, row_offsets, backend=backend), weight, dy)
    parts = [
        torch.einsum("nqi,nqo->qio", *rows) for rows in zip(*(t.split([1100, 1, 0, 599]) for t in (x, dy)), strict=True)
    ]
    assert_close(dweight, torch.stack(parts), "grouped_linear", "gradient of the weight")


def test_nan_spreads_inside_its_row_and_block_alone(backend: str):
    x, weight = torch.ones(9, 3, 5), torch.ones(1, 3, 5, 18)
    x[4, 1, 2] = torch.nan
    y = grouped_block_linear(x, weight, (0, 9), backend=backend)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[4, 1] = True
    assert y.isnan().equal(expected)


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    x, weight = torch.ones(7, 2, 3, dtype=torch.bfloat16), torch.ones(2, 2, 3, 4)
    dy = torch.ones(7, 2, 4, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.moxe.grouped_block_linear, (x, weight, [0, 3, 7]))
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.moxe.grouped_block_linear_backward, (dy, x, weight, [0, 3, 7], *needed))


def test_only_what_wants_a_gradient_gets_one(product: Product):
    row_offsets = (0, 2, 5)
    x, weight = draw(product, row_offsets, torch.float64)
    dx, dweight = torch.autograd.grad(product.op(x, weight, row_offsets).sum(), [x, weight])
    (dx_alone,) = torch.autograd.grad(product.op(x, weight.detach(), row_offsets).sum(), [x])
    (dweight_alone,) = torch.autograd.grad(product.op(x.detach(), weight, row_offsets).sum(), [weight])
    assert dx_alone.equal(dx)
    assert dweight_alone.equal(dweight)


def test_autocast_runs_the_products_in_its_dtype_and_gives_gradients_in_that_of_the_weights(product: Product):
    row_offsets = (0, 2, 5)
    x, weight = draw(product, row_offsets, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = product.op(x, weight, row_offsets)
    assert y.dtype == torch.bfloat16
    of_loop = weight.bfloat16() if product.autocast_rounds_weights else weight
    assert_close(y, product.loop(x.bfloat16().double(), of_loop.double(), row_offsets), "grouped_linear", "y")
    y.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "row_offsets", "named"),
    [
        ((5, 3), (2, 4, 2), (0, 2, 5), "(2, 4, 2)"),
        ((5, 3), (1, 4, 3), (0, 2, 5), "(1, 4, 3)"),
        ((6, 3), (2, 4, 3), (0, 2, 5), "(6, 3)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], row_offsets: tuple[int, ...], named: str
):
    with pytest.raises(ValueError, match=re.escape(named)):
        grouped_linear(torch.zeros(x_shape), torch.zeros(weight_shape), row_offsets)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "row_offsets", "named"),
    [
        ((5, 2, 3), (2, 2, 4, 3), (0, 2, 5), "(2, 2, 4, 3)"),
        ((5, 2, 3), (1, 2, 3, 4), (0, 2, 5), "(1, 2, 3, 4)"),
        ((5, 3, 3), (2, 2, 3, 4), (0, 2, 5), "(5, 3, 3)"),
        ((6, 2, 3), (2, 2, 3, 4), (0, 2, 5), "(6, 2, 3)"),
    ],
)
def test_block_shapes_that_do_not_agree_are_refused_with_the_sizes(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], row_offsets: tuple[int, ...], named: str
):
    with pytest.raises(ValueError, match=re.escape(named)):
        grouped_block_linear(torch.zeros(x_shape), torch.zeros(weight_shape), row_offsets)


@pytest.mark.parametrize("name", ["dense", "block-diagonal"])
def test_meta_tensors_pass_through(name: str):
    product = PRODUCTS[name]
    row_offsets = (0, 2, 5)
    x, weight = (leaf.detach() for leaf in draw(product, row_offsets, torch.bfloat16))
    y = product.op(x.to("meta"), weight.to("meta"), row_offsets)
    assert y.device.type == "meta"
    assert y.shape == product.op(x, weight, row_offsets).shape
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_offsets", [(0, 1), (0, 0, 3, 3, 4), (0, FEW_ROWS), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpu"])
def test_a_few_rows_without_gradients_give_what_many_rows_do(
    row_offsets: tuple[int, ...], weight_dtype: torch.dtype, backend: str
):
    """The weights are read as they are stored; x and y may be bfloat16 as well."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(row_offsets) - 1, 133, 37, generator=generator, dtype=torch.float64).to(weight_dtype)
    x = torch.randn(row_offsets[-1], 37, generator=generator, dtype=torch.float64).to(weight_dtype)
    expected = grouped_linear(x.double(), weight.double(), row_offsets, backend="torch")
    with torch.no_grad():
        y = grouped_linear(x, weight, row_offsets, backend=backend)
    assert y.dtype == weight_dtype
    assert_close(y, expected, "grouped_linear")


@pytest.mark.parametrize("backend", ["cpu"])
def test_with_gradients_a_few_rows_have_them(backend: str):
    weight, x = torch.randn(1, 5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    grouped_linear(x, weight, (0, 2), backend=backend).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
