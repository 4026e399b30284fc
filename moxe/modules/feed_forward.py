"""The gated feed-forward block, E of one shape stacked: f(x) = down(SiLU(a) b), [a, b] = up(norm(x)) or up(x).

Legend: N rows, E blocks, D hidden size, F width.
"""

from __future__ import annotations

from torch import Tensor, nn

from moxe.modules.stacks import StackedLayerNorm, StackedLinear, small_init_std, wang_init_std
from moxe.ops.gating import gated_silu
from moxe.ops.segments import Segments


class FeedForwardBlocks(nn.Module):
    """f of E feed-forward blocks; the block itself is x + f(x). Without an epsilon for it there is no norm."""

    def __init__(
        self,
        num_blocks: int,
        *,
        hidden_size: int,
        ffn_size: int,
        norm_eps: float | None,
        num_residual_blocks: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.norm = None
        if norm_eps is not None:
            self.norm = StackedLayerNorm(num_blocks, hidden_size, eps=norm_eps, backend=backend)
        std, out_std = small_init_std(hidden_size), wang_init_std(hidden_size, num_residual_blocks)
        self.up_proj = StackedLinear(num_blocks, hidden_size, 2 * ffn_size, init_std=std, backend=backend)
        self.down_proj = StackedLinear(num_blocks, ffn_size, hidden_size, init_std=out_std, backend=backend)

    def forward(self, x: Tensor, segments: Segments, state: None, return_state: bool) -> tuple[Tensor, None]:
        """f(x) [N, D] for x [N, D]; it has no state."""
        if self.norm is not None:
            x = self.norm(x, segments)
        gate_and_up = self.up_proj(x, segments)
        return self.down_proj(gated_silu(gate_and_up, backend=self.backend), segments), None
