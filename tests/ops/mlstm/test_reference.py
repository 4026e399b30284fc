"""The mLSTM's equations, token by token, against derivations that share nothing with them; all in float64.

Legend: T tokens of one segment, H heads, Dh head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe.ops.mlstm import MLSTMState
from moxe.ops.mlstm.reference import mlstm_reference
from tests.ops.cells import true_memory
from tests.oracles import mlstm_parallel, mlstm_unstabilised, mlstm_with_gradient_through_m
from tests.tolerances import assert_close

T, H, DH = 9, 2, 3
CU_SEQLENS = torch.tensor([0, T])


def draw(tokens: int = T, heads: int = H, size: int = DH) -> list[Tensor]:
    """q, k, v [T, H, Dh], igate, fgate [T, H], want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, size)] * 3 + [(tokens, heads)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def run(inputs: list[Tensor]) -> list[Tensor]:
    """h and the true memories C e^m, n e^m of one segment from an empty memory."""
    q, k, v, igate, fgate = inputs
    c0, n0 = q.new_zeros(1, H, DH, DH), q.new_zeros(1, H, DH)
    h, *state = mlstm_reference(q, k, v, igate, fgate, CU_SEQLENS, c0, n0, igate.new_full((1, H), -torch.inf))
    return [h, *(x[0] for x in true_memory(MLSTMState(*state)))]


def gradients_of(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def test_the_recurrence_equals_the_parallel_formula():
    inputs = draw()
    h, expected = run(inputs)[0], mlstm_parallel(*inputs)
    assert_close(h, expected, "mlstm", "h")
    pairs = zip(gradients_of([h], inputs), gradients_of([expected], inputs), strict=True)
    for actual, of_formula in pairs:
        assert_close(actual, of_formula, "mlstm", "gradient")


def test_the_recurrence_equals_the_one_without_a_stabiliser():
    """Also from an initial memory, and the memory that is left: h and C e^m are those of the plain equations."""
    inputs = draw()
    generator = torch.Generator().manual_seed(2)
    memory = torch.randn(H, DH, DH, generator=generator, dtype=torch.float64, requires_grad=True)
    normaliser = torch.randn(H, DH, generator=generator, dtype=torch.float64, requires_grad=True)
    m0 = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    scale = torch.exp(m0[0])
    q, k, v, igate, fgate = inputs
    expected = mlstm_unstabilised(q, k, v, igate, fgate, memory, normaliser)
    c0, n0 = (memory / scale[:, None, None])[None], (normaliser / scale[:, None])[None]
    h, *state = mlstm_reference(q, k, v, igate, fgate, CU_SEQLENS, c0, n0, m0)
    actual = [h, *(x[0] for x in true_memory(MLSTMState(*state)))]
    for name, a, e in zip(("h", "C", "n"), actual, expected, strict=True):
        assert_close(a, e, "mlstm", name)
    leaves = [*inputs, memory, normaliser]
    for a, e in zip(gradients_of(actual, leaves), gradients_of(list(expected), leaves), strict=True):
        assert_close(a, e, "mlstm", "gradient")


def test_sending_no_gradient_through_the_stabiliser_changes_no_gradient():
    inputs = draw()
    actual, expected = run(inputs), list(mlstm_with_gradient_through_m(*inputs))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "mlstm")
    for a, e in zip(gradients_of(actual, inputs), gradients_of(expected, inputs), strict=True):
        assert_close(a, e, "mlstm", "gradient")


def test_gradients_are_those_of_finite_differences():
    inputs = draw(tokens=4, heads=1, size=2)
    generator = torch.Generator().manual_seed(2)
    c0 = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    n0 = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    m0 = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)

    def h_and_memory(*leaves: Tensor) -> list[Tensor]:
        q, k, v, igate, fgate, c0, n0 = leaves
        h, *state = mlstm_reference(q, k, v, igate, fgate, torch.tensor([0, 3, 4]), c0, n0, m0)
        return [h, *true_memory(MLSTMState(*state))]

    assert torch.autograd.gradcheck(h_and_memory, [*inputs, c0, n0])
