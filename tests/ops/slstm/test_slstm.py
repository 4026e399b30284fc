"""The public sLSTM op: what it refuses, and what it returns.

Legend: N packed tokens, H heads, Dh head size, G segments, E groups.
"""

from __future__ import annotations

import re

import pytest
import torch

from moxe.ops.segments import Segments
from moxe.ops.slstm import SLSTMState, slstm

SEGMENTS = Segments.from_lengths([3, 2], (0, 0, 2))
SHAPES = {"gates": (5, 2, 4, 3), "recurrent": (2, 2, 3, 4, 3)}
STATE_SHAPES = {name: (2, 2, 3) for name in ("c", "n", "m", "h")}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gates": (5, 2, 12)}, "(5, 2, 12)"),
        ({"gates": (5, 2, 3, 4)}, "(5, 2, 3, 4)"),
        ({"gates": (6, 2, 4, 3)}, "6"),
        ({"recurrent": (1, 2, 3, 4, 3)}, "(1, 2, 3, 4, 3)"),
        ({"recurrent": (2, 2, 3, 12)}, "(2, 2, 3, 12)"),
        ({"c": (1, 2, 3)}, "(1, 2, 3)"),
        ({"n": (2, 2)}, "(2, 2)"),
        ({"m": (2, 2, 1)}, "(2, 2, 1)"),
        ({"h": (2, 6)}, "(2, 6)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = SHAPES | STATE_SHAPES | changed
    state = SLSTMState(*(torch.zeros(shapes[name]) for name in STATE_SHAPES))
    with pytest.raises(ValueError, match=re.escape(named)):
        slstm(torch.zeros(shapes["gates"]), torch.zeros(shapes["recurrent"]), SEGMENTS, initial_state=state)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is not one of: auto, reference, torch"):
        slstm(torch.zeros(SHAPES["gates"]), torch.zeros(SHAPES["recurrent"]), SEGMENTS, backend="cuda")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_final_state_is_given_on_request_alone(backend: str):
    gates, recurrent = torch.randn(SHAPES["gates"]), torch.randn(SHAPES["recurrent"])
    h, state = slstm(gates, recurrent, SEGMENTS, backend=backend)
    h_again, final = slstm(gates, recurrent, SEGMENTS, return_final_state=True, backend=backend)
    assert state is None
    assert final is not None
    assert h.equal(h_again)
    assert final.h.equal(h[[2, 4]])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_group_without_tokens_gets_a_gradient_of_exactly_zero(backend: str):
    gates = torch.randn(SHAPES["gates"])
    recurrent = torch.randn(SHAPES["recurrent"], requires_grad=True)
    h, _ = slstm(gates, recurrent, SEGMENTS, backend=backend)
    h.sum().backward()
    assert recurrent.grad is not None
    assert not recurrent.grad[0].any()
    assert recurrent.grad[1].any()
