"""The sLSTM block, E of one shape stacked: scalar memories with recurrent gates, then a gated feed-forward part.

Legend: N rows, K choices a row, G segments, E blocks, D hidden size, H heads, Dh = D / H, T taps.

    x~ = norm(x);  s = SiLU(conv(x~));  i, f from s and z, o from x~ (block-diagonal by head), + R h + b
    u = x + head-norm(cell(i, f, z, o));  f(x) = u + FFN(norm(u)) - x
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from moxe.modules.feed_forward import FeedForwardBlocks
from moxe.modules.stacks import (
    BlockState,
    StackedBlockLinear,
    StackedConv,
    StackedLayerNorm,
    parameters_of,
    small_init_std,
)
from moxe.ops.backend import core_dtype, without_autocast
from moxe.ops.grouped_linear import grouped_block_linear
from moxe.ops.segments import Segments
from moxe.ops.slstm import SLSTMState, slstm
from moxe.ops.slstm.gates import slstm_gates
from moxe.ops.slstm.step import slstm_step

FORGET_GATE = 1  # place of f among i, f, z, o
_CELL_OF_STEP = (
    ("norm", "weight"),
    ("conv", "weight"),
    ("conv", "bias"),
    ("if_proj", "weight"),
    ("zo_proj", "weight"),
    ("", "recurrent_weight"),
    ("", "gate_bias"),
    ("head_norm", "weight"),
)
_FFN_OF_STEP = (("norm", "weight"), ("up_proj", "weight"), ("down_proj", "weight"))


class SLSTMBlocks(nn.Module):
    """f of E sLSTM blocks; the block itself is x + f(x)."""

    def __init__(
        self,
        num_blocks: int,
        *,
        hidden_size: int,
        num_heads: int,
        conv_kernel_size: int,
        ffn_size: int,
        norm_eps: float,
        residual_block: int,
        num_residual_blocks: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.norm_eps, self.backend = num_heads, norm_eps, backend
        self.depth = residual_block / max(num_residual_blocks - 1, 1)
        size, std = hidden_size // num_heads, small_init_std(hidden_size)
        self.norm = StackedLayerNorm(num_blocks, hidden_size, eps=norm_eps, backend=backend)
        self.conv = StackedConv(num_blocks, hidden_size, conv_kernel_size, backend=backend)
        self.if_proj = StackedBlockLinear(num_blocks, num_heads, size, 2 * size, init_std=std, backend=backend)
        self.zo_proj = StackedBlockLinear(num_blocks, num_heads, size, 2 * size, init_std=std, backend=backend)
        self.recurrent_weight = nn.Parameter(torch.empty(num_blocks, num_heads, size, 4, size))
        self.gate_bias = nn.Parameter(torch.empty(num_blocks, num_heads, 4, size))
        self.head_norm = StackedLayerNorm(num_blocks, hidden_size, eps=norm_eps, heads=num_heads, backend=backend)
        self.ffn = FeedForwardBlocks(
            num_blocks,
            hidden_size=hidden_size,
            ffn_size=ffn_size,
            norm_eps=norm_eps,
            num_residual_blocks=num_residual_blocks,
            backend=backend,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Own parameters only; children reset themselves. Forget biases fall from 5 to -7 by a power of the depth."""
        nn.init.zeros_(self.recurrent_weight)
        nn.init.zeros_(self.gate_bias)
        size = self.gate_bias.shape[-1]
        place = torch.arange(size, device=self.gate_bias.device) / max(size - 1, 1)
        with torch.no_grad():
            self.gate_bias[:, :, FORGET_GATE] = 5.0 - 12.0 * place ** (0.3 + 1.3 * self.depth)

    def forward(
        self, x: Tensor, segments: Segments, state: BlockState | None, return_state: bool
    ) -> tuple[Tensor, BlockState | None]:
        """f(x) [N, D] for x [N, D] and, if asked for, the state behind each segment.

        A state holds conv [G, T - 1, D] and c, n, m, h [G, H, Dh].
        """
        _, h, cell_state, conv_state = self._run_cell(x, segments, state, return_state)
        mixed = self.head_norm(h.flatten(1), segments)
        out = mixed + self.ffn(x + mixed, segments, None, False)[0]
        if cell_state is None or conv_state is None:
            return out, None
        return out, {"conv": conv_state, **cell_state._asdict()}

    def forget_gates(self, x: Tensor, segments: Segments, state: BlockState | None) -> Tensor:
        """log f = log sigmoid(f~) [N, H, Dh] of each row, in float32 or float64; arguments as in `forward`.

        f~ has the recurrent part R h_{t-1}, so the cell is run for its h.
        """
        gates, h, _, _ = self._run_cell(x, segments, state, False)
        dtype = core_dtype(h)
        occupied = segments.lengths > 0
        begins = segments.cu_seqlens[:-1][occupied].to(h.device)
        before = h.to(dtype).roll(1, dims=0)
        before[begins] = 0 if state is None else state["h"][occupied.to(h.device)].to(dtype)
        with without_autocast(x.device.type):
            recurrent = grouped_block_linear(
                before, self.recurrent_weight[:, :, :, FORGET_GATE], segments.row_offsets, backend=self.backend
            )
        return logsigmoid(gates[:, :, FORGET_GATE].to(dtype) + recurrent)

    def _run_cell(
        self, x: Tensor, segments: Segments, state: BlockState | None, return_state: bool
    ) -> tuple[Tensor, Tensor, SLSTMState | None, Tensor | None]:
        """The gates without R h, bias included; h; and, if asked for, the states of the cell and of the convolution."""
        normed = self.norm(x, segments)
        convolved, conv_state = self.conv(normed, segments, state["conv"] if state else None, return_state)
        gates = slstm_gates(
            convolved,
            normed,
            self.if_proj.weight,
            self.zo_proj.weight,
            self.gate_bias.flatten(2),
            segments.row_offsets,
            backend=self.backend,
        )
        h, cell_state = slstm(
            gates,
            self.recurrent_weight,
            segments,
            initial_state=SLSTMState(*(state[name] for name in SLSTMState._fields)) if state else None,
            return_final_state=return_state,
            backend=self.backend,
        )
        return gates, h, cell_state, conv_state

    def step(self, x: Tensor, experts: Tensor, weights: Tensor, first: int, state: BlockState, out: Tensor) -> None:
        """Adds weights[n, k] f_{experts[n, k] - first}(x_n) to out [N, D] for one token of each of a few rows, in C++.

        x [N, D] and out are float32 or float64, experts and weights [N, K]; a state [N, E, ...] of every block changes
        in place. See `moxe.ops.slstm.step`.
        """
        parameters = parameters_of(self, _CELL_OF_STEP) + parameters_of(self.ffn, _FFN_OF_STEP)
        slstm_step(x, experts, weights, first, parameters, self.norm_eps, state, out)
