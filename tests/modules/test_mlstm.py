"""The mLSTM block against the paper's equations; its state; the precision of its gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moxe.modules.mlstm import MLSTMBlocks
from moxe.ops.segments import Segments
from tests.models.tiny import scramble
from tests.modules.comparison import assert_equal, assert_equal_with_gradients
from tests.modules.paper import mlstm_block, mlstm_cell, mlstm_forget_gates, weights_of

HEADS = 2


def make_blocks(num_blocks: int, backend: str = "torch", ffn_size: int = 0) -> MLSTMBlocks:
    torch.manual_seed(0)
    blocks = MLSTMBlocks(
        num_blocks,
        hidden_size=8,
        inner_size=16,
        num_heads=HEADS,
        conv_kernel_size=4,
        qkv_block_size=4,
        norm_eps=1e-5,
        num_residual_blocks=6,
        backend=backend,
        ffn_size=ffn_size,
    )
    scramble(blocks, scale=0.4)
    return blocks.double()


def rows(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ffn_size", [0, 12])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_mlstm_blocks_compute_the_papers_equations_with_all_gradients(backend: str, ffn_size: int):
    """A stack of three, the second without tokens, over segments of unequal length, one of them empty."""
    blocks = make_blocks(3, backend, ffn_size)
    segments = Segments.from_lengths([5, 1, 7, 0, 2], group_offsets=(0, 2, 2, 5))
    x = rows(15).requires_grad_()
    y, state = blocks(x, segments, None, False)
    expected = [
        mlstm_block(part, weights_of(blocks, block), HEADS)
        for part, block in zip(x.split([5, 1, 7, 2]), (0, 0, 2, 2), strict=True)
    ]
    assert state is None
    assert_equal_with_gradients(y, torch.cat(expected), {"x": x, **dict(blocks.named_parameters())})


def test_the_stabiliser_of_the_mlstm_cell_changes_nothing():
    """h = C^T q / max(|n^T q|, 1) with C and n in their true scale; this is why no gradient is sent through m."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, HEADS, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    igate, fgate = (2 * torch.randn(6, HEADS, generator=generator, dtype=torch.float64) for _ in range(2))
    c, n, expected = torch.zeros(HEADS, 4, 4).double(), torch.zeros(HEADS, 4).double(), []
    for t in range(6):
        f, i, key = torch.sigmoid(fgate[t]), torch.exp(igate[t]), k[t] / math.sqrt(4)
        c = f[:, None, None] * c + i[:, None, None] * torch.einsum("hk,hv->hkv", key, v[t])
        n = f[:, None] * n + i[:, None] * key
        scale = torch.einsum("hk,hk->h", n, q[t]).abs().clamp(min=1)
        expected.append(torch.einsum("hkv,hk->hv", c, q[t]) / scale[:, None])
    assert_equal(mlstm_cell(q, k, v, igate, fgate, torch.ones(6, dtype=torch.bool)), torch.stack(expected))


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_an_mlstm_block_that_stops_and_goes_on_equals_one_that_does_not_stop(cut: int):
    blocks, x = make_blocks(1), rows(9)
    whole, last = blocks(x, Segments.from_lengths([9]), None, True)
    head, state = blocks(x[:cut], Segments.from_lengths([cut]), None, True)
    tail, end = blocks(x[cut:], Segments.from_lengths([9 - cut]), state, True)
    assert_equal(torch.cat([head, tail]), whole)
    # c and n are written down in the scale e^m, which may differ; the memory c e^m may not.
    for name in ("c", "n"):
        size = (..., *(None,) * (last[name].ndim - 2))
        assert_equal(end[name] * end["m"].exp()[size], last[name] * last["m"].exp()[size])
    assert_equal(end["conv"], last["conv"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "auto"])
def test_forget_gates_are_those_of_the_papers_cell(backend: str, dtype: torch.dtype):
    blocks = make_blocks(3, backend).to(dtype)
    segments = Segments.from_lengths([5, 1, 7, 0, 2], group_offsets=(0, 2, 2, 5))
    x = rows(15).to(dtype)
    log_f = blocks.forget_gates(x, segments, None)
    exact = [{name: weight.double() for name, weight in weights_of(blocks, block).items()} for block in range(3)]
    expected = [
        mlstm_forget_gates(part.double(), exact[block], HEADS)
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
