"""The feed-forward block against its equation."""

from __future__ import annotations

import pytest
import torch

from moxe.modules.feed_forward import FeedForwardBlocks
from moxe.ops.segments import Segments
from tests.models.tiny import scramble
from tests.modules.comparison import assert_equal_with_gradients
from tests.modules.paper import feed_forward_block, weights_of


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_feed_forward_blocks_are_down_of_silu_times_up_of_the_norm_with_all_gradients(backend: str):
    blocks = FeedForwardBlocks(3, hidden_size=8, ffn_size=12, norm_eps=1e-5, num_residual_blocks=6, backend=backend)
    scramble(blocks)
    blocks.double()
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y, state = blocks(x, Segments.from_lengths([4, 3], group_offsets=(0, 1, 1, 2)), None, False)
    expected = [
        feed_forward_block(part, weights_of(blocks, e)) for part, e in zip(x.split([4, 3]), (0, 2), strict=True)
    ]
    assert state is None
    assert_equal_with_gradients(y, torch.cat(expected), {"x": x, **dict(blocks.named_parameters())})
