"""The fast backends are proper torch operators: schemas, fake kernels, torch.compile, meta tensors, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moxe.ops.mlstm import MLSTMState
from moxe.ops.mlstm.torch_backend import mlstm_torch, mlstm_torch_backward
from moxe.ops.segments import Segments
from moxe.ops.slstm import SLSTMState, slstm
from moxe.ops.slstm.torch_backend import slstm_torch, slstm_torch_backward
from tests.ops.cells import HEADS, MLSTM, SIZE, SLSTM, Cell, Inputs, true_memory
from tests.tolerances import assert_close

SEGMENTS = Segments.from_lengths([5, 0, 12, 1], (0, 1, 4))
both_cells = pytest.mark.parametrize("cell", [MLSTM, SLSTM], ids=["mlstm", "slstm"])


def leaves_of(cell: Cell, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = cell.make_inputs(SEGMENTS, dtype, with_state=True)
    return {name: x.requires_grad_(name != "m0") for name, x in inputs.items()}


every_mlstm = pytest.mark.parametrize(
    ("op", "backward_op"),
    [(mlstm_torch, mlstm_torch_backward), (torch.ops.moxe.mlstm_cpu, torch.ops.moxe.mlstm_cpu_backward)],
    ids=["torch", "cpu"],
)


@every_mlstm
def test_the_mlstm_op_keeps_to_its_schema_and_its_fake_kernel(op: Callable, backward_op: Callable):
    tokens = [leaves_of(MLSTM)[name] for name in MLSTM.token_inputs]
    torch.library.opcheck(op, (*tokens, SEGMENTS.cu_seqlens, None, None, None, 5, False))


@every_mlstm
def test_the_mlstm_op_with_states_keeps_to_its_schema_and_its_fake_kernel(op: Callable, backward_op: Callable):
    inputs = leaves_of(MLSTM, torch.bfloat16)
    tokens = [inputs[name] for name in MLSTM.token_inputs]
    state = [inputs[name] for name in MLSTM.state_inputs]
    torch.library.opcheck(op, (*tokens, SEGMENTS.cu_seqlens, *state, 5, True))


@every_mlstm
@pytest.mark.parametrize("with_state", [False, True])
def test_the_mlstm_backward_op_keeps_to_its_schema_and_its_fake_kernel(
    op: Callable, backward_op: Callable, with_state: bool
):
    inputs = MLSTM.make_inputs(SEGMENTS, torch.bfloat16, with_state=True)
    tokens = [inputs[name] for name in MLSTM.token_inputs]
    state = [inputs[name] for name in MLSTM.state_inputs] if with_state else [None] * 3
    gradients = (torch.ones_like(inputs["q"]), inputs["c0"], None)
    torch.library.opcheck(backward_op, (*tokens, SEGMENTS.cu_seqlens, *state, 5, *gradients))


@pytest.mark.parametrize("return_final_state", [False, True])
def test_the_slstm_op_keeps_to_its_schema_and_its_fake_kernel(return_final_state: bool):
    inputs = leaves_of(SLSTM)
    state = [inputs[name] for name in SLSTM.state_inputs]
    offsets = list(SEGMENTS.group_offsets)
    arguments = (inputs["gates"], inputs["recurrent"], SEGMENTS.cu_seqlens, offsets, *state, return_final_state)
    torch.library.opcheck(slstm_torch, arguments)


def test_the_slstm_backward_op_keeps_to_its_schema_and_its_fake_kernel():
    inputs = SLSTM.make_inputs(SEGMENTS, torch.float32, with_state=True)
    offsets = list(SEGMENTS.group_offsets)
    state = [inputs[name] for name in SLSTM.state_inputs]
    h, *_, gates, states = slstm_torch(
        inputs["gates"], inputs["recurrent"], SEGMENTS.cu_seqlens, offsets, *state, False
    )
    gradients = (torch.ones_like(h), inputs["c0"], None, inputs["h0"])
    arguments = (inputs["recurrent"], SEGMENTS.cu_seqlens, offsets, gates, states, *gradients)
    torch.library.opcheck(slstm_torch_backward, arguments)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["cpu-float32", "cpu-bfloat16"])
@pytest.mark.parametrize("with_state", [False, True], ids=["empty memory", "initial state"])
def test_the_compiled_slstm_op_keeps_to_its_schema_and_its_fake_kernel(
    dtype: torch.dtype, with_state: bool, needs_grad: bool
):
    inputs = leaves_of(SLSTM, dtype) if needs_grad else SLSTM.make_inputs(SEGMENTS, dtype, with_state=True)
    bias = torch.randn(2, HEADS, 4, SIZE, requires_grad=needs_grad)
    state = [inputs[name] for name in SLSTM.state_inputs] if with_state else [None] * 4
    layout = (SEGMENTS.cu_seqlens, list(SEGMENTS.group_offsets))
    arguments = (inputs["gates"], inputs["recurrent"], bias, *layout, *state, with_state, needs_grad)
    torch.library.opcheck(torch.ops.moxe.slstm_cpu, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["cpu-float32", "cpu-bfloat16"])
@pytest.mark.parametrize("with_state", [False, True], ids=["empty memory", "initial state"])
def test_the_compiled_slstm_backward_op_keeps_to_its_schema_and_its_fake_kernel(dtype: torch.dtype, with_state: bool):
    inputs = SLSTM.make_inputs(SEGMENTS, dtype, with_state=True)
    c0, n0, m0, h0 = [inputs[name] for name in SLSTM.state_inputs] if with_state else [None] * 4
    layout = (SEGMENTS.cu_seqlens, list(SEGMENTS.group_offsets))
    forward = (inputs["gates"], inputs["recurrent"], None, *layout, c0, n0, m0, h0, False, True)
    h, *_, saved, hidden = torch.ops.moxe.slstm_cpu(*forward)
    hidden = hidden if dtype == torch.bfloat16 else h
    gradients = (torch.ones_like(h), c0, None, h0, dtype, with_state)
    arguments = (inputs["recurrent"], *layout, c0, n0, h0, saved, hidden, *gradients)
    torch.library.opcheck(torch.ops.moxe.slstm_cpu_backward, arguments)


@pytest.mark.parametrize("of_state_alone", [False, True], ids=["h and state", "state alone"])
@both_cells
def test_a_compiled_function_gives_the_same(cell: Cell, of_state_alone: bool):
    """One graph, through the fake kernels; `aot_eager` needs no C compiler."""
    inputs = leaves_of(cell)

    def loss(inputs: Inputs) -> Tensor:
        h, state = cell.through("auto")({name: x if name == "m0" else 2 * x for name, x in inputs.items()}, SEGMENTS)
        of_state = torch.stack([x.square().sum() for x in true_memory(state)]).sum()
        return of_state if of_state_alone else of_state + h.square().sum()

    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(inputs)
    eager = loss(inputs)
    assert_close(compiled, eager, cell.name, "loss")
    pairs = zip(*(torch.autograd.grad(x, list(wanted.values())) for x in (compiled, eager)), strict=True)
    for name, (actual, expected) in zip(wanted, pairs, strict=True):
        assert_close(actual, expected, cell.name, f"gradient of {name}")


@both_cells
def test_meta_tensors_pass_through(cell: Cell):
    inputs = {name: x.to("meta") for name, x in cell.make_inputs(SEGMENTS, torch.bfloat16, with_state=True).items()}
    h, state = cell.implementations["torch"](inputs, SEGMENTS)
    assert h.device.type == "meta"
    assert h.dtype == torch.bfloat16
    assert h.shape == (SEGMENTS.num_tokens, HEADS, SIZE)
    assert [x.shape for x in state] == [inputs[name].shape for name in cell.state_inputs]
    assert {x.dtype for x in state} == {torch.float32}


def test_the_mlstm_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 1, 2)] * 3 + [(5, 1)] * 2 + [(2, 1, 2, 2), (2, 1, 2)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    m0 = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)

    def h_and_memory(*leaves: Tensor) -> list[Tensor]:
        q, k, v, igate, fgate, c0, n0 = leaves
        h, *state = mlstm_torch(q, k, v, igate, fgate, torch.tensor([0, 4, 5]), c0, n0, m0, 2, True)
        return [h, *true_memory(MLSTMState(*state))]

    assert torch.autograd.gradcheck(h_and_memory, leaves)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_slstm_gradients_are_those_of_finite_differences(backend: str):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 1, 4, 2), (2, 1, 2, 4, 2), (3, 1, 2), (3, 1, 2), (3, 1, 2)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    m0 = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).view(3, 1, 2)
    segments = Segments.from_lengths([3, 1, 1], (0, 1, 3))

    def h_and_memory(gates: Tensor, recurrent: Tensor, c0: Tensor, log_n0: Tensor, h0: Tensor) -> list[Tensor]:
        state = SLSTMState(c0, log_n0.exp(), m0, h0)
        h, final = slstm(gates, recurrent, segments, initial_state=state, return_final_state=True, backend=backend)
        assert final is not None
        return [h, *true_memory(final)]

    assert torch.autograd.gradcheck(h_and_memory, leaves)
