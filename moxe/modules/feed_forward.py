"""The gated feed-forward block, E of one shape stacked: f(x) = down(SiLU(a) b), [a, b] = up(norm(x)).

Legend: N rows, E blocks, D hidden size, F width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moxe.modules.stacks import StackedLayerNorm, StackedLinear, small_init_std, wang_init_std
from moxe.ops.segments import Segments


class FeedForwardBlocks(nn.Module):
    """f of E feed-forward blocks; the block itself is x + f(x)."""

    def __init__(
        self, num_blocks: int, *, hidden_size: int, ffn_size: int, norm_eps: float, num_residual_blocks: int
    ) -> None:
        super().__init__()
        self.norm = StackedLayerNorm(num_blocks, hidden_size, eps=norm_eps)
        std, out_std = small_init_std(hidden_size), wang_init_std(hidden_size, num_residual_blocks)
        self.up_proj = StackedLinear(num_blocks, hidden_size, 2 * ffn_size, init_std=std)
        self.down_proj = StackedLinear(num_blocks, ffn_size, hidden_size, init_std=out_std)

    def forward(self, x: Tensor, segments: Segments, state: None, return_state: bool) -> tuple[Tensor, None]:
        """f(x) [N, D] for x [N, D]; it has no state."""
        gate, up = self.up_proj(self.norm(x, segments), segments).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, segments), None
