"""The public mLSTM op: what it refuses, and what its torch backend costs.

Legend: N packed tokens, S tokens of one segment, H heads, Dh head size, G segments.
"""

from __future__ import annotations

import re

import pytest
import torch

from moxe.ops.mlstm import MLSTMState, mlstm
from moxe.ops.mlstm.torch_backend import chunk_length
from moxe.ops.segments import Segments

SEGMENTS = Segments.from_lengths([3, 2])
SHAPES = {"q": (5, 2, 4), "k": (5, 2, 4), "v": (5, 2, 4), "igate": (5, 2), "fgate": (5, 2)}
STATE_SHAPES = {"c": (2, 2, 4, 4), "n": (2, 2, 4), "m": (2, 2)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": (5, 8)}, "(5, 8)"),
        ({"k": (5, 2, 3)}, "(5, 2, 3)"),
        ({"v": (4, 2, 4)}, "(4, 2, 4)"),
        ({"igate": (5, 1)}, "(5, 1)"),
        ({"fgate": (5, 2, 1)}, "(5, 2, 1)"),
        ({"q": (6, 2, 4), "k": (6, 2, 4), "v": (6, 2, 4), "igate": (6, 2), "fgate": (6, 2)}, "6"),
        ({"c": (1, 2, 4, 4)}, "(1, 2, 4, 4)"),
        ({"n": (2, 2, 3)}, "(2, 2, 3)"),
        ({"m": (2,)}, "(2,)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_with_the_sizes(changed: dict[str, tuple[int, ...]], named: str):
    shapes = SHAPES | STATE_SHAPES | changed
    q, k, v, igate, fgate = (torch.zeros(shapes[name]) for name in SHAPES)
    state = MLSTMState(*(torch.zeros(shapes[name]) for name in STATE_SHAPES))
    with pytest.raises(ValueError, match=re.escape(named)):
        mlstm(q, k, v, igate, fgate, SEGMENTS, initial_state=state)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    q, k, v, igate, fgate = (torch.zeros(shape) for shape in SHAPES.values())
    with pytest.raises(ValueError, match="backend='cuda' is not one of: auto, reference, torch"):
        mlstm(q, k, v, igate, fgate, SEGMENTS, backend="cuda")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_final_state_is_given_on_request_alone(backend: str):
    q, k, v, igate, fgate = (torch.randn(shape) for shape in SHAPES.values())
    h, state = mlstm(q, k, v, igate, fgate, SEGMENTS, backend=backend)
    h_again, final = mlstm(q, k, v, igate, fgate, SEGMENTS, return_final_state=True, backend=backend)
    assert state is None
    assert final is not None
    assert h.equal(h_again)


def allocations(tokens: int, heads: int = 1, size: int = 4) -> tuple[int, int]:
    """The largest and the sum of all allocations, in bytes, of a forward and backward pass over one segment."""
    shapes = [(tokens, heads, size)] * 3 + [(tokens, heads)] * 2
    q, k, v, igate, fgate = (torch.randn(shape, requires_grad=True) for shape in shapes)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        h, _ = mlstm(q, k, v, igate, fgate, Segments.from_lengths([tokens]), backend="torch")
        h.backward(torch.ones_like(h))
    events = profile.events()
    assert events
    allocated = [event.self_cpu_memory_usage for event in events if event.self_cpu_memory_usage > 0]
    return max(allocated), sum(allocated)


def test_memory_grows_linearly_with_the_length():
    """Nothing of size S x S: the largest tensor holds S x (a chunk's length) numbers, and doubling S doubles all."""
    largest, total = allocations(2048)
    assert largest <= 4 * 2048 * chunk_length(4)
    half_largest, half_total = allocations(1024)
    assert largest == 2 * half_largest
    assert 1.9 < total / half_total < 2.1
