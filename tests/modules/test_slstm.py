"""The sLSTM block against the paper's equations, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moxe.modules.slstm import SLSTMBlocks
from moxe.ops.segments import Segments
from tests.models.tiny import scramble
from tests.modules.comparison import assert_equal, assert_equal_with_gradients
from tests.modules.paper import slstm_block, slstm_cell, slstm_forget_gates, weights_of

HEADS = 2


def make_blocks(num_blocks: int, backend: str = "torch") -> SLSTMBlocks:
    torch.manual_seed(0)
    blocks = SLSTMBlocks(
        num_blocks,
        hidden_size=8,
        num_heads=HEADS,
        conv_kernel_size=4,
        ffn_size=12,
        norm_eps=1e-5,
        residual_block=0,
        num_residual_blocks=6,
        backend=backend,
    )
    scramble(blocks, scale=0.4)
    return blocks.double()


def rows(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_slstm_blocks_compute_the_papers_equations_with_all_gradients(backend: str):
    """A stack of three, the second without tokens, over segments of unequal length, one of them empty."""
    blocks = make_blocks(3, backend)
    segments = Segments.from_lengths([5, 1, 7, 0, 2], group_offsets=(0, 2, 2, 5))
    x = rows(15).requires_grad_()
    y, state = blocks(x, segments, None, False)
    expected = [
        slstm_block(part, weights_of(blocks, block), HEADS)
        for part, block in zip(x.split([5, 1, 7, 2]), (0, 0, 2, 2), strict=True)
    ]
    assert state is None
    assert_equal_with_gradients(y, torch.cat(expected), {"x": x, **dict(blocks.named_parameters())})


def test_the_stabiliser_of_the_slstm_cell_changes_nothing():
    """h = sigmoid(o) c / n with c and n in their true scale; this is why no gradient is sent through m."""
    generator = torch.Generator().manual_seed(0)
    gates = 2 * torch.randn(6, HEADS, 4, 3, generator=generator, dtype=torch.float64)
    recurrent = torch.randn(HEADS, 3, 4, 3, generator=generator, dtype=torch.float64)
    c = n = h = torch.zeros(HEADS, 3, dtype=torch.float64)
    expected = []
    for t in range(6):
        i, f, z, o = (gates[t] + torch.einsum("hi,higo->hgo", h, recurrent)).unbind(1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        expected.append(h)
    assert_equal(slstm_cell(gates, recurrent, torch.ones(6, dtype=torch.bool)), torch.stack(expected))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_every_segment_starts_in_the_scale_of_its_first_token(backend: str):
    """Input gates of e^-1000 are 0 in any fixed scale, and h would be 0 / 0; only their ratios count."""
    blocks, x, segments = make_blocks(1, backend), rows(9), Segments.from_lengths([4, 1, 4])
    expected = blocks(x, segments, None, False)[0]
    with torch.no_grad():
        blocks.gate_bias[:, :, 0] -= 1000
    assert_equal(blocks(x, segments, None, False)[0], expected)


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_an_slstm_block_that_stops_and_goes_on_equals_one_that_does_not_stop(cut: int):
    blocks, x = make_blocks(1), rows(9)
    whole, last = blocks(x, Segments.from_lengths([9]), None, True)
    head, state = blocks(x[:cut], Segments.from_lengths([cut]), None, True)
    tail, end = blocks(x[cut:], Segments.from_lengths([9 - cut]), state, True)
    assert_equal(torch.cat([head, tail]), whole)
    for name in ("c", "n", "m", "h", "conv"):
        assert_equal(end[name], last[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "auto"])
def test_forget_gates_are_those_of_the_papers_cell(backend: str, dtype: torch.dtype):
    blocks = make_blocks(3, backend).to(dtype)
    segments = Segments.from_lengths([5, 1, 7, 0, 2], group_offsets=(0, 2, 2, 5))
    x = rows(15).to(dtype)
    log_f = blocks.forget_gates(x, segments, None)
    exact = [{name: weight.double() for name, weight in weights_of(blocks, block).items()} for block in range(3)]
    expected = [
        slstm_forget_gates(part.double(), exact[block], HEADS)
        for part, block in zip(x.split([5, 1, 7, 2]), (0, 0, 2, 2), strict=True)
    ]
    assert log_f.dtype == dtype
    assert_equal(log_f, torch.cat(expected))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_forget_gates_go_on_from_a_state(backend: str):
    """Of two segments, the second empty before the cut."""
    blocks, x = make_blocks(1, backend), rows(9)
    whole = blocks.forget_gates(x, Segments.from_lengths([6, 3]), None)
    first, rest = x[:4], x[4:]
    _, state = blocks(first, Segments.from_lengths([4, 0]), None, True)
    assert_equal(blocks.forget_gates(first, Segments.from_lengths([4, 0]), None), whole[:4])
    assert_equal(blocks.forget_gates(rest, Segments.from_lengths([2, 3]), state), whole[4:])
    none = blocks.forget_gates(x[:0], Segments.from_lengths([0, 0]), state)
    assert none.shape == (0, *whole.shape[1:])
