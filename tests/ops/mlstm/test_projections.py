"""What the mLSTM cell reads, against products of a loop over rows.

Legend: N rows, E groups, C channels in blocks of B, H heads.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moxe.ops.cpu import build
from moxe.ops.mlstm.projections import mlstm_projections
from tests.oracles import grouped_block_linear_by_loop, grouped_linear_by_loop
from tests.tolerances import assert_close

ROW_OFFSETS = {
    "one group": (0, 7),
    "one row": (0, 1),
    "no rows": (0, 0, 0),
    "unequal groups, some without rows": (0, 0, 9, 10, 10, 31, 31),
    "several tasks a group": (0, 270, 270, 349),
}
every_grouping = pytest.mark.parametrize("row_offsets", ROW_OFFSETS.values(), ids=ROW_OFFSETS)
OUTPUTS = ("q", "k", "v", "igate", "fgate")
Inputs = dict[str, Tensor]


def draw(row_offsets: tuple[int, ...], blocks: int, block: int, heads: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, groups, channels = row_offsets[-1], len(row_offsets) - 1, blocks * block
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("convolved", "branch"), (rows, channels))
    shapes |= dict.fromkeys(("q_weight", "k_weight", "v_weight"), (groups, blocks, block, block))
    shapes |= {"gate_weight": (groups, 2 * heads, 3 * channels), "gate_bias": (groups, 2 * heads)}
    of_parameters = torch.promote_types(dtype, torch.float32)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    dtypes = {name: dtype for name in ("convolved", "branch")}
    return {name: x.to(dtypes.get(name, of_parameters)).requires_grad_() for name, x in drawn.items()}


def by_loop(inputs: Inputs, row_offsets: tuple[int, ...], stored: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v rounded to how they are stored, as the gates see them; the rounding has the gradient of the identity."""
    block = inputs["q_weight"].shape[-1]
    projected = []
    for source, name in (("convolved", "q_weight"), ("convolved", "k_weight"), ("branch", "v_weight")):
        by_block = inputs[source].unflatten(1, (-1, block))
        exact = grouped_block_linear_by_loop(by_block, inputs[name], row_offsets).flatten(1)
        projected.append(exact + (exact.to(stored).double() - exact).detach())
    gates = grouped_linear_by_loop(torch.cat(projected, 1), inputs["gate_weight"], row_offsets)
    sizes = torch.tensor(row_offsets).diff()
    return *projected, *(gates + inputs["gate_bias"].repeat_interleave(sizes, 0)).chunk(2, dim=1)


def check_against_loop(
    row_offsets: tuple[int, ...], blocks: int, block: int, heads: int, dtype: torch.dtype, backend: str
) -> None:
    inputs = draw(row_offsets, blocks, block, heads, dtype)
    of_loop = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    actual = mlstm_projections(**inputs, row_offsets=row_offsets, backend=backend)
    expected = by_loop(of_loop, row_offsets, dtype)
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert a.dtype == (inputs["gate_bias"].dtype if name.endswith("gate") else dtype)
        assert_close(a, e, "projections", name)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randint(-9, 10, a.shape, generator=generator) for a in actual]
    grads = torch.autograd.grad(
        actual, list(inputs.values()), [d.to(a.dtype) for d, a in zip(upstream, actual, strict=True)]
    )
    loss = sum((e * d).sum() for e, d in zip(expected, upstream, strict=True))
    loss = loss + 0 * sum(leaf.sum() for leaf in of_loop.values())
    for (name, leaf), grad, e in zip(
        inputs.items(), grads, torch.autograd.grad(loss, list(of_loop.values())), strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert_close(grad, e, "projections", f"gradient of {name}", computed_in=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_grouping
def test_outputs_and_gradients_match_the_loop(row_offsets: tuple[int, ...], dtype: torch.dtype, backend: str):
    check_against_loop(row_offsets, 5, 4, 3, dtype, backend)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_size_of_blocks(block: int, dtype: torch.dtype, backend: str):
    check_against_loop((0, 9, 9, 28), 3, block, 2, dtype, backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("block", [4, 16])
def test_of_bfloat16_everything_is_summed_in_float32_and_rounded_once(block: int, backend: str):
    if not torch.ops.moxe.fits_in_vector(torch.float32, block):
        pytest.skip(f"{block} channels do not fit into a vector of this processor")
    check_against_loop((0, 9, 9, 28), 3, block, 2, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_that_fit_into_a_vector_go_through_one_pass(dtype: torch.dtype, backend: str):
    lanes = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16) // dtype.itemsize
    for block in (3, 4, 16):
        q, *_ = mlstm_projections(**draw((0, 5), 3, block, 2, dtype), row_offsets=(0, 5), backend=backend)
        assert q.grad_fn is not None
        in_one_pass = "MLSTMProjectionsCpu" in q.grad_fn.name()
        assert in_one_pass == (block in (4, 16) and block <= lanes)


@pytest.mark.usefixtures("poisoned_memory")
@every_grouping
def test_no_uninitialised_memory_is_ever_read(row_offsets: tuple[int, ...], backend: str):
    check_against_loop(row_offsets, 5, 4, 3, torch.float32, backend)


def test_gradients_are_those_of_finite_differences(backend: str):
    inputs = draw((0, 0, 3, 4), 1, 4, 1, torch.float64)

    def projections(*leaves: Tensor) -> tuple[Tensor, ...]:
        return mlstm_projections(*leaves, row_offsets=(0, 0, 3, 4), backend=backend)

    assert torch.autograd.gradcheck(projections, list(inputs.values()))


def test_under_autocast_rows_are_bfloat16_and_gates_float32(backend: str):
    inputs = draw((0, 7), 3, 4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = mlstm_projections(**inputs, row_offsets=(0, 7), backend=backend)
    assert [x.dtype for x in outputs] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_a_row_depends_on_no_other_and_not_on_its_place(backend: str):
    inputs = draw((0, 30), 5, 16, 2, torch.float32)
    whole = mlstm_projections(**inputs, row_offsets=(0, 30), backend=backend)
    if backend == "cpu":
        for n in (0, 9, 29):
            one = {name: x[n : n + 1] for name, x in inputs.items() if x.ndim == 2 and name != "gate_bias"}
            for a, b in zip(
                mlstm_projections(**(inputs | one), row_offsets=(0, 1), backend=backend), whole, strict=True
            ):
                assert a.equal(b[n : n + 1])
    with torch.no_grad():
        inputs["branch"][4] = torch.nan
    spoiled = mlstm_projections(**inputs, row_offsets=(0, 30), backend=backend)
    assert spoiled[2][4].isnan().all()
    others = [n for n in range(30) if n != 4]
    assert all(a[others].equal(b[others]) for a, b in zip(spoiled, whole, strict=True))


def test_rows_may_lie_apart(backend: str):
    inputs = draw((0, 7), 3, 4, 1, torch.float64)
    wide = torch.cat([inputs["convolved"], inputs["branch"]], 1)
    halves = dict(zip(("convolved", "branch"), wide.split(12, 1), strict=True))
    actual = mlstm_projections(**(inputs | halves), row_offsets=(0, 7), backend=backend)
    expected = mlstm_projections(**inputs, row_offsets=(0, 7), backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "projections")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"branch": (5, 6)}, "(5, 6)"),
        ({"k_weight": (2, 2, 2, 2)}, "(2, 2, 2, 2)"),
        ({"q_weight": (3, 1, 4, 4), "k_weight": (3, 1, 4, 4), "v_weight": (3, 1, 4, 4)}, "E=2 groups"),
        ({"gate_weight": (2, 4, 8)}, "(2, 4, 8)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict, named: str):
    shapes: dict = dict.fromkeys(("convolved", "branch"), (5, 4))
    shapes |= dict.fromkeys(("q_weight", "k_weight", "v_weight"), (2, 1, 4, 4))
    shapes |= {"gate_weight": (2, 4, 12), "gate_bias": (2, 4)}
    inputs = {name: torch.zeros(shape) for name, shape in (shapes | changed).items()}
    with pytest.raises(ValueError, match=re.escape(named)):
        mlstm_projections(**inputs, row_offsets=(0, 2, 5))


def test_meta_tensors_pass_through():
    inputs = {name: x.detach().to("meta") for name, x in draw((0, 7), 3, 4, 2, torch.bfloat16).items()}
    shapes = [x.shape for x in mlstm_projections(**inputs, row_offsets=(0, 7))]
    assert shapes == [(7, 12)] * 3 + [(7, 2)] * 2


def test_the_compiled_ops_keep_to_their_schemas_and_fake_kernels():
    if reason := build.why_unavailable():
        pytest.skip(reason)
    *inputs, bias = (x.detach() for x in draw((0, 3, 7), 3, 4, 2, torch.bfloat16).values())
    torch.library.opcheck(torch.ops.moxe.mlstm_projections, (*inputs, bias, [0, 3, 7]))
    q, k, v, igate, fgate = torch.ops.moxe.mlstm_projections(*inputs, bias, [0, 3, 7])
    rows, weights = inputs[:2], inputs[2:]
    arguments = (q, k, v, igate, fgate, *rows, q, k, v, *weights, [0, 3, 7])
    torch.library.opcheck(torch.ops.moxe.mlstm_projections_backward, arguments)
