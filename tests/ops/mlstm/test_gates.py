"""The gates of the mLSTM against one product of concatenated sources, row by row.

Legend: N rows, E groups, C channels, H heads.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moxe.ops.cpu import build
from moxe.ops.mlstm.gates import mlstm_gates
from tests.oracles import grouped_linear_by_loop
from tests.tolerances import assert_close

ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 4, 5, 5, 11, 11),
}
every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)
Inputs = dict[str, Tensor]


def draw(row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, groups = row_offsets[-1], len(row_offsets) - 1
    shapes = dict.fromkeys("qkv", (rows, channels))
    shapes |= {"weight": (groups, 2 * heads, 3 * channels), "bias": (groups, 2 * heads)}
    # Parameters stay float32 under autocast.
    dtypes = {name: torch.promote_types(dtype, torch.float32) for name in ("weight", "bias")}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes.get(name, dtype)).requires_grad_()
        for name, shape in shapes.items()
    }


def gates_by_loop(inputs: Inputs, row_offsets: tuple[int, ...]) -> Tensor:
    rows = torch.cat([inputs[name] for name in "qkv"], 1)
    sizes = torch.tensor(row_offsets).diff()
    bias = inputs["bias"].repeat_interleave(sizes, 0)
    return grouped_linear_by_loop(rows, inputs["weight"], row_offsets) + bias


def check_against_loop(
    row_offsets: tuple[int, ...], channels: int, heads: int, dtype: torch.dtype, backend: str
) -> None:
    inputs = draw(row_offsets, channels, heads, dtype)
    of_loop = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    igate, fgate = mlstm_gates(**inputs, row_offsets=row_offsets, backend=backend)
    expected = gates_by_loop(of_loop, row_offsets)
    assert igate.dtype == fgate.dtype == inputs["weight"].dtype
    assert_close(igate, expected[:, :heads], "grouped_linear", "igate")
    assert_close(fgate, expected[:, heads:], "grouped_linear", "fgate")
    d = torch.randint(-9, 10, expected.shape, generator=torch.Generator().manual_seed(1)).to(igate.dtype)
    grads = torch.autograd.grad([igate, fgate], list(inputs.values()), [d[:, :heads], d[:, heads:]])
    loss = (expected * d).sum() + 0 * sum(leaf.sum() for leaf in of_loop.values())
    expected_grads = torch.autograd.grad(loss, list(of_loop.values()))
    for name, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, expected_grad, "grouped_linear", f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_grouping
def test_outputs_and_gradients_match_the_loop(row_offsets: tuple[int, ...], dtype: torch.dtype, backend: str):
    check_against_loop(row_offsets, 21, 3, dtype, backend)


@pytest.mark.parametrize(("channels", "heads"), [(1, 1), (16, 4), (70, 5)])
def test_any_number_of_channels_heads_and_rows(channels: int, heads: int, backend: str):
    check_against_loop((0, 270, 270, 349), channels, heads, torch.float64, backend)


@every_grouping
@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], backend: str):
    check_against_loop(row_offsets, 21, 3, torch.float32, backend)


def test_gradients_are_those_of_finite_differences(backend: str):
    inputs = draw((0, 0, 3, 4), 2, 1, torch.float64)

    def gates(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return mlstm_gates(*leaves, row_offsets=(0, 0, 3, 4), backend=backend)

    assert torch.autograd.gradcheck(gates, list(inputs.values()))


def test_autocast_changes_nothing(backend: str):
    inputs = draw((0, 3, 7), 21, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = mlstm_gates(**inputs, row_offsets=(0, 3, 7), backend=backend)
    outside = mlstm_gates(**inputs, row_offsets=(0, 3, 7), backend=backend)
    for actual, expected in zip(under_autocast, outside, strict=True):
        assert actual.equal(expected)


def test_a_row_depends_on_no_other_not_even_when_that_is_nan(backend: str):
    inputs = draw((0, 5), 21, 2, torch.float32)
    spoiled = {name: x.detach().clone() for name, x in inputs.items()}
    spoiled["k"][2, 20] = torch.nan
    for gate, clean in zip(
        mlstm_gates(**spoiled, row_offsets=(0, 5), backend=backend),
        mlstm_gates(**inputs, row_offsets=(0, 5), backend=backend),
        strict=True,
    ):
        assert gate[2].isnan().all()
        others = [0, 1, 3, 4]
        assert gate[others].equal(clean[others])


def test_rows_may_lie_apart(backend: str):
    inputs = draw((0, 7), 6, 1, torch.float64)
    wide = torch.cat([inputs[name] for name in "qkv"], 1)
    halves = dict(zip("qkv", wide.split(6, 1), strict=True))
    actual = mlstm_gates(**(inputs | halves), row_offsets=(0, 7), backend=backend)
    for gate, expected in zip(actual, mlstm_gates(**inputs, row_offsets=(0, 7), backend=backend), strict=True):
        assert_close(gate, expected, "grouped_linear", "gate")


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"k": (5, 4)}, "(5, 4)"), ({"weight": (2, 4, 8)}, "(2, 4, 8)"), ({"bias": (1, 4)}, "(1, 4)")],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = dict.fromkeys("qkv", (5, 3)) | {"weight": (2, 4, 9), "bias": (2, 4)} | changed
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(named)):
        mlstm_gates(**inputs, row_offsets=(0, 2, 5))


def test_meta_tensors_pass_through():
    inputs = {name: x.detach().to("meta") for name, x in draw((0, 7), 6, 2, torch.bfloat16).items()}
    for gate in mlstm_gates(**inputs, row_offsets=(0, 7)):
        assert (gate.device.type, gate.shape, gate.dtype) == ("meta", (7, 2), torch.float32)


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    inputs = [x.detach() for x in draw((0, 3, 7), 6, 2, torch.bfloat16).values()]
    gates = torch.library.opcheck(torch.ops.moxe.mlstm_gates, (*inputs, [0, 3, 7]))
    assert set(gates.values()) == {"SUCCESS"}
    d = torch.ones(7, 2)
    torch.library.opcheck(torch.ops.moxe.mlstm_gates_backward, (d, d, *inputs[:4], [0, 3, 7]))
