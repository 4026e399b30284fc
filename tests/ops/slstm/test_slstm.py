"""The public sLSTM op: what it refuses, and what it returns.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moxe.ops.segments import Segments
from moxe.ops.slstm import SLSTMState, slstm
from tests.tolerances import assert_close

SEGMENTS = Segments.from_lengths([3, 2], (0, 0, 2))
SHAPES = {"gates": (5, 2, 4, 3), "recurrent": (2, 2, 3, 4, 3)}
STATE_SHAPES = {name: (2, 2, 3) for name in ("c", "n", "m", "h")}
every_backend = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(
    gates: Tensor, recurrent: Tensor, bias: Tensor, segments: Segments, backend: str
) -> dict[str, Tensor]:
    """h, and the gradients of the three tensors for a loss that weighs h at random; with numbers of every dtype."""
    leaves = {"gates": gates, "recurrent": recurrent, "bias": bias}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    h, _ = slstm(leaves["gates"], leaves["recurrent"], segments, bias=leaves["bias"], backend=backend)
    weights = (4 * draw(*h.shape, seed=9)).round().to(h.dtype)
    grads = torch.autograd.grad(h, list(leaves.values()), weights)
    return {"h": h.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gates": (5, 2, 12)}, "(5, 2, 12)"),
        ({"gates": (5, 2, 3, 4)}, "(5, 2, 3, 4)"),
        ({"gates": (6, 2, 4, 3)}, "6"),
        ({"recurrent": (1, 2, 3, 4, 3)}, "(1, 2, 3, 4, 3)"),
        ({"recurrent": (2, 2, 3, 12)}, "(2, 2, 3, 12)"),
        ({"bias": (1, 2, 4, 3)}, "(1, 2, 4, 3)"),
        ({"c": (1, 2, 3)}, "(1, 2, 3)"),
        ({"n": (2, 2)}, "(2, 2)"),
        ({"m": (2, 2, 1)}, "(2, 2, 1)"),
        ({"h": (2, 6)}, "(2, 6)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = SHAPES | {"bias": (2, 2, 4, 3)} | STATE_SHAPES | changed
    state = SLSTMState(*(torch.zeros(shapes[name]) for name in STATE_SHAPES))
    gates, recurrent, bias = (torch.zeros(shapes[name]) for name in ("gates", "recurrent", "bias"))
    with pytest.raises(ValueError, match=re.escape(named)):
        slstm(gates, recurrent, SEGMENTS, bias=bias, initial_state=state)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is not one of: auto, reference, torch"):
        slstm(torch.zeros(SHAPES["gates"]), torch.zeros(SHAPES["recurrent"]), SEGMENTS, backend="cuda")


@every_backend
def test_the_final_state_is_given_on_request_alone(backend: str):
    gates, recurrent = torch.randn(SHAPES["gates"]), torch.randn(SHAPES["recurrent"])
    h, state = slstm(gates, recurrent, SEGMENTS, backend=backend)
    h_again, final = slstm(gates, recurrent, SEGMENTS, return_final_state=True, backend=backend)
    assert state is None
    assert final is not None
    assert h.equal(h_again)
    assert final.h.equal(h[[2, 4]])


@every_backend
def test_a_group_without_tokens_gets_a_gradient_of_exactly_zero(backend: str):
    gates = torch.randn(SHAPES["gates"])
    recurrent = torch.randn(SHAPES["recurrent"], requires_grad=True)
    h, _ = slstm(gates, recurrent, SEGMENTS, backend=backend)
    h.sum().backward()
    assert recurrent.grad is not None
    assert not recurrent.grad[0].any()
    assert recurrent.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("size", [4, 16, 19, 40, 64])
def test_every_head_size_matches_the_oracle_with_bias(size: int, backend: str, dtype: torch.dtype):
    """Whole vectors and a rest, one group of a single token, one of unequal segments, one empty."""
    segments = Segments.from_lengths([1, 9, 0, 33, 9, 9, 4], (0, 1, 1, 7))
    core = torch.promote_types(dtype, torch.float32)
    gates, bias = draw(65, 3, 4, size, dtype=dtype), draw(3, 3, 4, size, seed=1, dtype=core)
    recurrent = (draw(3, 3, size, 4, size, seed=2) / size**0.5).to(core)
    actual = with_gradients(gates, recurrent, bias, segments, backend)
    expected = with_gradients(gates.double(), recurrent.double(), bias.double(), segments, "reference")
    for name, value in expected.items():
        assert_close(actual[name], value, "slstm", name)
        assert actual[name].dtype == (dtype if name in ("h", "gates") else core)


@every_backend
def test_a_bias_is_the_same_as_gates_that_hold_it(backend: str):
    gates, recurrent, bias = draw(5, 2, 4, 3), draw(2, 2, 3, 4, 3, seed=1), draw(2, 2, 4, 3, seed=2)
    h, _ = slstm(gates, recurrent, SEGMENTS, bias=bias, backend=backend)
    expected, _ = slstm(gates + bias[1], recurrent, SEGMENTS, backend=backend)
    assert_close(h, expected, "slstm", "h")


@pytest.mark.parametrize("lengths", [[40], [9, 1, 7, 0, 9, 9, 2, 5], [3] * 70], ids=["one", "few", "many"])
def test_results_do_not_depend_on_the_number_of_threads_nor_on_other_segments(lengths: list[int]):
    """Bit by bit, although threads cut the segments into other tiles."""
    segments, tokens = Segments.from_lengths(lengths), sum(lengths)
    gates, bias = draw(tokens, 3, 4, 20, dtype=torch.float32), draw(1, 3, 4, 20, seed=1, dtype=torch.float32)
    recurrent = draw(1, 3, 20, 4, 20, seed=2, dtype=torch.float32) / 20**0.5
    expected = with_gradients(gates, recurrent, bias, segments, "cpu")
    torch.set_num_threads(5)
    try:
        for name, value in with_gradients(gates, recurrent, bias, segments, "cpu").items():
            assert value.equal(expected[name]), name
    finally:
        torch.set_num_threads(1)
    alone, _ = slstm(gates[: lengths[0]], recurrent, Segments.from_lengths(lengths[:1]), bias=bias, backend="cpu")
    assert alone.equal(expected["h"][: lengths[0]])


@every_backend
def test_rows_of_gates_may_be_part_of_a_wider_tensor(backend: str):
    segments = Segments.from_lengths([3, 2])
    wide, recurrent = draw(5, 4, 4, 3), draw(1, 2, 3, 4, 3, seed=1)
    h, _ = slstm(wide[:, 2:], recurrent, segments, backend=backend)
    expected, _ = slstm(wide[:, 2:].contiguous(), recurrent, segments, backend=backend)
    assert h.equal(expected)


@pytest.mark.parametrize("place", range(4), ids=["i", "f", "z", "o"])
@every_backend
def test_nan_in_a_gate_reaches_every_later_token_of_its_head_and_no_other(backend: str, place: int):
    """Through h: at its own token it stays in its channel, and that of the output gate in h alone."""
    segments = Segments.from_lengths([4, 3])
    gates, recurrent = draw(7, 2, 4, 5, dtype=torch.float32), draw(1, 2, 5, 4, 5, seed=1, dtype=torch.float32)
    gates[1, 0, place, 2] = torch.nan
    h, _ = slstm(gates, recurrent, segments, backend=backend)
    expected = torch.zeros_like(h, dtype=torch.bool)
    expected[1, 0, 2] = expected[2:4, 0] = True
    assert h.isnan().equal(expected)
