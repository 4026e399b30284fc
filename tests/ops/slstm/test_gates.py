"""The gates of the sLSTM against a loop over rows and heads.

Legend: N rows, E groups, D channels, H heads, Dh = D / H.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moxe.ops.cpu import build
from moxe.ops.slstm.gates import slstm_gates
from tests.oracles import grouped_block_linear_by_loop
from tests.tolerances import assert_close

ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 4, 5, 5, 11, 11),
}
every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)
Inputs = dict[str, Tensor]


def draw(row_offsets: tuple[int, ...], heads: int, size: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    shapes = dict.fromkeys(("convolved", "normed"), (rows, heads * size))
    shapes |= dict.fromkeys(("if_weight", "zo_weight"), (groups, heads, size, 2 * size))
    shapes["bias"] = (groups, heads, 4 * size)
    # Parameters stay float32 under autocast.
    parameters = torch.promote_types(dtype, torch.float32)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype if name in ("convolved", "normed") else parameters)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def gates_by_loop(inputs: Inputs, row_offsets: tuple[int, ...]) -> Tensor:
    heads, size = inputs["if_weight"].shape[1:3]
    halves = [
        grouped_block_linear_by_loop(inputs[rows].unflatten(-1, (heads, size)), inputs[weight], row_offsets)
        for rows, weight in (("convolved", "if_weight"), ("normed", "zo_weight"))
    ]
    bias = inputs["bias"].repeat_interleave(torch.tensor(row_offsets).diff(), 0)
    return (torch.cat(halves, -1) + bias).unflatten(-1, (4, size))


def check_against_loop(row_offsets: tuple[int, ...], heads: int, size: int, dtype: torch.dtype, backend: str) -> None:
    inputs = draw(row_offsets, heads, size, dtype)
    of_loop = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    gates, expected = (
        slstm_gates(**inputs, row_offsets=row_offsets, backend=backend),
        gates_by_loop(of_loop, row_offsets),
    )
    assert gates.dtype == inputs["bias"].dtype
    assert_close(gates, expected, "grouped_linear", "gates")
    d = torch.randint(-9, 10, expected.shape, generator=torch.Generator().manual_seed(1)).to(gates.dtype)
    grads = torch.autograd.grad(gates, list(inputs.values()), d)
    loss = (expected * d).sum() + 0 * sum(leaf.sum() for leaf in of_loop.values())
    expected_grads = torch.autograd.grad(loss, list(of_loop.values()))
    for name, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, expected_grad, "grouped_linear", f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_grouping
def test_outputs_and_gradients_match_the_loop(row_offsets: tuple[int, ...], dtype: torch.dtype, backend: str):
    check_against_loop(row_offsets, 3, 5, dtype, backend)


@every_grouping
def test_compiled_gates_of_bfloat16_rows_are_as_precise_as_the_parameters(row_offsets: tuple[int, ...]):
    if reason := build.why_unavailable():
        pytest.skip(reason)
    check_against_loop(row_offsets, 2, 9, torch.bfloat16, "cpu")


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (4, 16), (2, 35)])
def test_any_number_of_heads_channels_and_rows(heads: int, size: int, backend: str):
    check_against_loop((0, 530, 530, 549), heads, size, torch.float64, backend)


@every_grouping
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], backend: str):
    check_against_loop(row_offsets, 3, 5, torch.float32, backend)


def test_gradients_are_those_of_finite_differences(backend: str):
    inputs = draw((0, 0, 3, 4), 2, 2, torch.float64)

    def gates(*leaves: Tensor) -> Tensor:
        return slstm_gates(*leaves, row_offsets=(0, 0, 3, 4), backend=backend)

    assert torch.autograd.gradcheck(gates, list(inputs.values()))


def test_under_autocast_gates_and_gradients_of_parameters_are_float32(backend: str):
    inputs = draw((0, 3, 7), 2, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = {name: inputs[name].bfloat16() for name in ("convolved", "normed")}
        gates = slstm_gates(**(inputs | rows), row_offsets=(0, 3, 7), backend=backend)
    assert gates.dtype == torch.float32
    grads = torch.autograd.grad(gates.sum(), list(inputs.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_nan_spreads_inside_its_row_head_and_half_alone(backend: str):
    inputs = draw((0, 5), 3, 5, torch.float32)
    spoiled = inputs | {"normed": inputs["normed"].detach().clone()}
    spoiled["normed"][2, 7] = torch.nan
    gates = slstm_gates(**spoiled, row_offsets=(0, 5), backend=backend)
    expected = torch.zeros_like(gates, dtype=torch.bool)
    expected[2, 1, 2:] = True
    assert gates.isnan().equal(expected)


def test_rows_may_lie_apart(backend: str):
    inputs = draw((0, 7), 2, 3, torch.float64)
    wide = torch.cat([inputs["convolved"], inputs["normed"]], 1)
    halves = dict(zip(("convolved", "normed"), wide.chunk(2, 1), strict=True))
    actual = slstm_gates(**(inputs | halves), row_offsets=(0, 7), backend=backend)
    assert_close(actual, slstm_gates(**inputs, row_offsets=(0, 7), backend=backend), "grouped_linear", "gates")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"normed": (4, 6)}, "(4, 6)"),
        ({"convolved": (5, 4)}, "(5, 4)"),
        ({"if_weight": (2, 2, 3, 3)}, "(2, 2, 3, 3)"),
        ({"zo_weight": (1, 2, 3, 6)}, "(1, 2, 3, 6)"),
        ({"bias": (2, 2, 3)}, "(2, 2, 3)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = {"convolved": (5, 6), "normed": (5, 6), "if_weight": (2, 2, 3, 6), "zo_weight": (2, 2, 3, 6)}
    shapes |= {"bias": (2, 2, 12)} | changed
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(named)):
        slstm_gates(**inputs, row_offsets=(0, 2, 5))


def test_meta_tensors_pass_through():
    inputs = {name: x.detach().to("meta") for name, x in draw((0, 7), 2, 3, torch.float32).items()}
    gates = slstm_gates(**inputs, row_offsets=(0, 7))
    assert (gates.device.type, gates.shape, gates.dtype) == ("meta", (7, 2, 4, 3), torch.float32)


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    inputs = [x.detach() for x in draw((0, 3, 7), 2, 3, torch.bfloat16).values()]
    torch.library.opcheck(torch.ops.moxe.slstm_gates, (*inputs, [0, 3, 7]))
    arguments = (torch.ones(7, 2, 4, 3), *inputs[:4], [0, 3, 7])
    torch.library.opcheck(torch.ops.moxe.slstm_gates_backward, arguments)
