"""The sLSTM's equations, token by token, against derivations that share nothing with them; all in float64.

Legend: T tokens of one segment, H heads, Dh head size, E groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.slstm import SLSTMState
from moxe.ops.slstm.reference import slstm_reference
from tests.ops.cells import true_memory
from tests.oracles import slstm_unstabilised, slstm_with_gradient_through_m
from tests.tolerances import assert_close

T, H, DH = 9, 2, 3
CU_SEQLENS = torch.tensor([0, T])


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run(gates: Tensor, recurrent: Tensor) -> list[Tensor]:
    """h and the true memories c e^m, n e^m of one segment from an empty memory."""
    zeros = torch.zeros(1, H, DH, dtype=torch.float64)
    state = (zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)
    h, *state = slstm_reference(gates, recurrent[None], CU_SEQLENS, [0, 1], *state)
    return [h, *(x[0] for x in true_memory(SLSTMState(*state))[:2])]


def gradients_of(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def test_the_recurrence_equals_the_one_without_a_stabiliser():
    """Also from an initial memory, and the memory that is left: h, c e^m and n e^m are those of the plain equations."""
    gates, recurrent, memory, log_normaliser, h0 = draw((T, H, 4, DH), (H, DH, 4, DH), (H, DH), (H, DH), (H, DH))
    normaliser = log_normaliser.exp()
    m0 = torch.linspace(-2, 2, H * DH, dtype=torch.float64).view(H, DH)
    expected = slstm_unstabilised(gates, recurrent, memory, normaliser, h0)
    initial = [x[None] for x in (memory * torch.exp(-m0), normaliser * torch.exp(-m0), m0, h0)]
    h, *state = slstm_reference(gates, recurrent[None], CU_SEQLENS, [0, 1], *initial)
    assert state[3][0].equal(h[-1])
    actual = [h, *(x[0] for x in true_memory(SLSTMState(*state))[:2])]
    for name, a, e in zip(("h", "c", "n"), actual, expected, strict=True):
        assert_close(a, e, "slstm", name)
    leaves = [gates, recurrent, memory, log_normaliser, h0]
    for a, e in zip(gradients_of(actual, leaves), gradients_of(list(expected), leaves), strict=True):
        assert_close(a, e, "slstm", "gradient")


def test_each_group_uses_its_own_recurrent_matrices():
    gates, recurrent = draw((T, H, 4, DH), (3, H, DH, 4, DH))
    zeros = torch.zeros(3, H, DH, dtype=torch.float64)
    state = (zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)
    h, *_ = slstm_reference(gates, recurrent, torch.tensor([0, 2, 5, T]), [0, 1, 1, 3], *state)
    bounds = [(0, 2, 0), (2, 5, 2), (5, T, 2)]
    expected = [slstm_unstabilised(gates[a:b], recurrent[e], *zeros)[0] for a, b, e in bounds]
    assert_close(h, torch.cat(expected), "slstm", "h")


def test_sending_no_gradient_through_the_stabiliser_changes_no_gradient():
    leaves = draw((T, H, 4, DH), (H, DH, 4, DH))
    actual, expected = run(*leaves), list(slstm_with_gradient_through_m(*leaves))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "slstm")
    for a, e in zip(gradients_of(actual, leaves), gradients_of(expected, leaves), strict=True):
        assert_close(a, e, "slstm", "gradient")


def test_gradients_are_those_of_finite_differences():
    gates, recurrent, c0, log_n0, h0 = draw((4, 1, 4, 2), (1, 1, 2, 4, 2), (2, 1, 2), (2, 1, 2), (2, 1, 2))
    m0 = torch.tensor([[[0.5, 0.0]], [[-0.5, 1.0]]], dtype=torch.float64)

    def h_and_memory(gates: Tensor, recurrent: Tensor, c0: Tensor, log_n0: Tensor, h0: Tensor) -> list[Tensor]:
        h, *state = slstm_reference(gates, recurrent, torch.tensor([0, 3, 4]), [0, 2], c0, log_n0.exp(), m0, h0)
        return [h, *true_memory(SLSTMState(*state))]

    assert torch.autograd.gradcheck(h_and_memory, [gates, recurrent, c0, log_n0, h0])
