"""Experts made of the ops: sorted, packed and stacked, against one expert on one sequence at a time.

Legend: N packed tokens, D hidden size, E experts, K experts a token, H heads, Dh = D / H.

The expert here is all that remembers: a convolution, its output projected to what a cell takes, and the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moxe.ops.conv import causal_conv
from moxe.ops.grouped_linear import grouped_linear
from moxe.ops.mlstm import mlstm
from moxe.ops.routing import assign, combine, dispatch
from moxe.ops.segments import Segments
from moxe.ops.slstm import slstm
from tests.oracles import (
    conv_by_loop,
    experts_by_double_loop,
    experts_by_masked_state,
    masked_conv,
    masked_mlstm,
    masked_slstm,
    mlstm_unstabilised,
    slstm_unstabilised,
)
from tests.tolerances import assert_close

E, H, DH, TAPS = 4, 2, 3, 4
D = H * DH
BACKENDS = ["reference", "torch"]


@dataclass(frozen=True)
class Kind:
    """What follows the convolution of one kind of expert."""

    projected: int  # outputs of the projection, for each of the D inputs: those of the cell
    packed: Callable[[Tensor, Tensor, Segments, str], Tensor]  # (projected, recurrent, segments, backend) -> h
    plain: Callable[[Tensor, Tensor], Tensor]  # one sequence from an empty memory
    masked: Callable[[Tensor, Tensor, Tensor], Tensor]  # one sequence, all tokens; (projected, recurrent of e, routed)


def mlstm_inputs(projected: Tensor) -> list[Tensor]:
    q, k, v, gates = projected.split([D, D, D, 2 * H], dim=-1)
    return [x.unflatten(-1, (H, DH)) for x in (q, k, v)] + list(gates.chunk(2, dim=-1))


def packed_mlstm(projected: Tensor, recurrent: Tensor, segments: Segments, backend: str) -> Tensor:
    q, k, v, igate, fgate = mlstm_inputs(projected)
    return mlstm(q, k, v, igate, fgate, segments, backend=backend)[0]


def plain_mlstm(projected: Tensor, recurrent: Tensor) -> Tensor:
    memory, normaliser = projected.new_zeros(H, DH, DH), projected.new_zeros(H, DH)
    q, k, v, igate, fgate = mlstm_inputs(projected)
    return mlstm_unstabilised(q, k, v, igate, fgate, memory, normaliser)[0]


def dense_mlstm(projected: Tensor, recurrent: Tensor, routed: Tensor) -> Tensor:
    q, k, v, igate, fgate = mlstm_inputs(projected)
    return masked_mlstm(q, k, v, igate, fgate, routed)


def packed_slstm(projected: Tensor, recurrent: Tensor, segments: Segments, backend: str) -> Tensor:
    return slstm(projected.unflatten(-1, (H, 4, DH)), recurrent, segments, backend=backend)[0]


def plain_slstm(projected: Tensor, recurrent: Tensor) -> Tensor:
    zeros = projected.new_zeros(H, DH)
    return slstm_unstabilised(projected.unflatten(-1, (H, 4, DH)), recurrent, zeros, zeros, zeros)[0]


def dense_slstm(projected: Tensor, recurrent: Tensor, routed: Tensor) -> Tensor:
    return masked_slstm(projected.unflatten(-1, (H, 4, DH)), recurrent, routed)


KINDS = {
    "mlstm": Kind(3 * D + 2 * H, packed_mlstm, plain_mlstm, dense_mlstm),
    "slstm": Kind(4 * D, packed_slstm, plain_slstm, dense_slstm),
}
SEQUENCES = Segments.from_lengths([9, 1, 14, 0, 4])


def draw(kind: Kind, k: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """expert_indices [N, K], of which expert 2 is never one; and tokens, routing weights, expert weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = SEQUENCES.num_tokens
    liked = torch.tensor([0, 1, 3])
    indices = liked[torch.rand(tokens, len(liked), generator=generator).argsort(1)[:, :k]]
    shapes = {
        "x": (tokens, D),
        "routing": (tokens, k),
        "taps": (E, D, TAPS),
        "bias": (E, D),
        "projection": (E, kind.projected, D),
        "recurrent": (E, H, DH, 4, DH),
    }
    leaves = {name: torch.randn(s, generator=generator, dtype=torch.float64) / 2 for name, s in shapes.items()}
    return indices, {name: x.to(dtype) for name, x in leaves.items()}


def by_ops(kind: Kind, backend: str, indices: Tensor, p: dict[str, Tensor], *, remembers: bool = True) -> Tensor:
    assignments = assign(indices, SEQUENCES, one_token_segments=not remembers)
    own = assignments.of_experts(0, E)
    convolved, _ = causal_conv(dispatch(p["x"], assignments), p["taps"], p["bias"], own.segments)
    projected = grouped_linear(torch.tanh(convolved), p["projection"], own.segments.row_offsets)
    h = kind.packed(projected, p["recurrent"], own.segments, backend)
    return combine(h.flatten(1), p["routing"], assignments)


def by_double_loop(kind: Kind, indices: Tensor, p: dict[str, Tensor], *, remembers: bool = True) -> Tensor:
    def run_expert(e: int, tokens: Tensor) -> Tensor:
        nothing = tokens.new_zeros(1, TAPS - 1, D)
        convolved, _ = conv_by_loop(tokens, p["taps"], p["bias"], [0, len(tokens)], [e], nothing)
        return kind.plain(torch.tanh(convolved) @ p["projection"][e].T, p["recurrent"][e]).flatten(1)

    bounds = SEQUENCES.cu_seqlens.tolist() if remembers else list(range(len(indices) + 1))
    return experts_by_double_loop(p["x"], indices, p["routing"], bounds, E, run_expert)


def by_masked_state(kind: Kind, indices: Tensor, p: dict[str, Tensor]) -> Tensor:
    def run_masked_expert(e: int, tokens: Tensor, routed: Tensor) -> Tensor:
        convolved = masked_conv(tokens, p["taps"][e], p["bias"][e], routed)
        return kind.masked(torch.tanh(convolved) @ p["projection"][e].T, p["recurrent"][e], routed).flatten(1)

    return experts_by_masked_state(p["x"], indices, p["routing"], SEQUENCES.cu_seqlens.tolist(), E, run_masked_expert)


def outputs_and_gradients(run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = run(leaves)
    dy = torch.randint(-9, 10, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert_close(actual[name], value, "experts", name)


every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
@every_backend
@every_kind
def test_experts_equal_the_double_loop_over_sequences_and_experts(kind: Kind, backend: str, k: int, dtype: torch.dtype):
    indices, inputs = draw(kind, k, dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = outputs_and_gradients(lambda p: by_double_loop(kind, indices, p), exact)
    assert_all_close(outputs_and_gradients(lambda p: by_ops(kind, backend, indices, p), inputs), expected)


@every_backend
@every_kind
def test_experts_equal_dense_ones_whose_memory_other_tokens_do_not_touch(kind: Kind, backend: str):
    indices, inputs = draw(kind, 2, torch.float64)
    expected = outputs_and_gradients(lambda p: by_masked_state(kind, indices, p), inputs)
    assert_all_close(outputs_and_gradients(lambda p: by_ops(kind, backend, indices, p), inputs), expected)


@every_backend
@every_kind
def test_without_memory_each_token_is_a_sequence_of_its_own(kind: Kind, backend: str):
    indices, inputs = draw(kind, 2, torch.float64)
    expected = outputs_and_gradients(lambda p: by_double_loop(kind, indices, p, remembers=False), inputs)
    actual = outputs_and_gradients(lambda p: by_ops(kind, backend, indices, p, remembers=False), inputs)
    assert_all_close(actual, expected)
    assert not actual["gradient of recurrent"].any()


@every_backend
@every_kind
def test_an_expert_that_no_token_chose_gets_gradients_of_exactly_zero(kind: Kind, backend: str):
    indices, inputs = draw(kind, 2, torch.float32)
    found = outputs_and_gradients(lambda p: by_ops(kind, backend, indices, p), inputs)
    for name in ("taps", "bias", "projection"):
        grad = found[f"gradient of {name}"]
        assert [bool(of_expert.any()) for of_expert in grad] == [True, True, False, True], name
