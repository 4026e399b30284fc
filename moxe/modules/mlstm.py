"""The mLSTM block, E of one shape stacked: matrix memory between an up- and a down-projection.

Legend: N rows, K choices a row, G segments, E blocks, D hidden size, I inner size, H heads, Dh = I / H, T taps, F width
of the feed-forward part.

    x~ = norm(x);  [a, g] = up(x~);  s = SiLU(conv(a));  q, k = from s, v = from a (block-diagonal)
    igate, fgate = from [q, k, v];  y = head-norm(cell(q, k, v, igate, fgate)) + skip s;  f(x) = down(y SiLU(g))

With a feed-forward part behind it, as an sLSTM block has one: u = x + down(y SiLU(g)), f(x) = u + FFN(norm(u)) - x.
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
    StackedLinear,
    parameters_of,
    small_init_std,
    wang_init_std,
)
from moxe.ops.gating import mlstm_output
from moxe.ops.mlstm import MLSTMState, mlstm
from moxe.ops.mlstm.projections import Projections, mlstm_projections
from moxe.ops.mlstm.step import mlstm_step
from moxe.ops.segments import Segments

_PARAMETERS_OF_STEP = (
    ("norm", "weight"),
    ("up_proj", "weight"),
    ("conv", "weight"),
    ("conv", "bias"),
    ("q_proj", "weight"),
    ("k_proj", "weight"),
    ("v_proj", "weight"),
    ("", "gate_weight"),
    ("", "gate_bias"),
    ("head_norm", "weight"),
    ("", "skip"),
    ("down_proj", "weight"),
)


class MLSTMBlocks(nn.Module):
    """f of E mLSTM blocks; the block itself is x + f(x). With a width F > 0 they have a feed-forward part."""

    def __init__(
        self,
        num_blocks: int,
        *,
        hidden_size: int,
        inner_size: int,
        num_heads: int,
        conv_kernel_size: int,
        qkv_block_size: int,
        norm_eps: float,
        num_residual_blocks: int,
        backend: str,
        ffn_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads, self.norm_eps, self.backend = num_heads, norm_eps, backend
        std = small_init_std(hidden_size)
        blocks = (inner_size // qkv_block_size, qkv_block_size, qkv_block_size)
        self.norm = StackedLayerNorm(num_blocks, hidden_size, eps=norm_eps, backend=backend)
        self.up_proj = StackedLinear(num_blocks, hidden_size, 2 * inner_size, init_std=std, backend=backend)
        self.conv = StackedConv(num_blocks, inner_size, conv_kernel_size, backend=backend)
        self.q_proj = StackedBlockLinear(num_blocks, *blocks, init_std=std, backend=backend)
        self.k_proj = StackedBlockLinear(num_blocks, *blocks, init_std=std, backend=backend)
        self.v_proj = StackedBlockLinear(num_blocks, *blocks, init_std=std, backend=backend)
        # Rows: igate of each head, then fgate of each head; columns: q, k, v.
        self.gate_weight = nn.Parameter(torch.empty(num_blocks, 2 * num_heads, 3 * inner_size))
        self.gate_bias = nn.Parameter(torch.empty(num_blocks, 2 * num_heads))
        self.head_norm = StackedLayerNorm(num_blocks, inner_size, eps=norm_eps, heads=num_heads, backend=backend)
        self.skip = nn.Parameter(torch.empty(num_blocks, inner_size))
        out_std = wang_init_std(hidden_size, num_residual_blocks)
        self.down_proj = StackedLinear(num_blocks, inner_size, hidden_size, init_std=out_std, backend=backend)
        self.ffn = None
        if ffn_size:
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
        """Own parameters only; children reset themselves."""
        heads = self.num_heads
        nn.init.zeros_(self.gate_weight)
        nn.init.normal_(self.gate_bias, std=0.1)
        with torch.no_grad():
            self.gate_bias[:, heads:] = torch.linspace(3.0, 6.0, heads, device=self.gate_bias.device)
        nn.init.ones_(self.skip)

    def forward(
        self, x: Tensor, segments: Segments, state: BlockState | None, return_state: bool
    ) -> tuple[Tensor, BlockState | None]:
        """f(x) [N, D] for x [N, D] and, if asked for, the state behind each segment.

        A state holds conv [G, T - 1, I], c [G, H, Dh, Dh], n [G, H, Dh] and m [G, H].
        """
        heads = self.num_heads
        (q, k, v, igate, fgate), convolved, gate, conv_state = self._cell_inputs(x, segments, state, return_state)
        h, cell_state = mlstm(
            q.unflatten(-1, (heads, -1)),
            k.unflatten(-1, (heads, -1)),
            v.unflatten(-1, (heads, -1)),
            igate,
            fgate,
            segments,
            initial_state=MLSTMState(state["c"], state["n"], state["m"]) if state else None,
            return_final_state=return_state,
            backend=self.backend,
        )
        mixed = mlstm_output(
            h.flatten(1),
            convolved,
            gate,
            self.head_norm.weight,
            self.skip,
            segments.row_offsets,
            heads=heads,
            eps=self.head_norm.eps,
            backend=self.backend,
        )
        out = self.down_proj(mixed, segments)
        if self.ffn is not None:
            out = out + self.ffn(x + out, segments, None, False)[0]
        if cell_state is None or conv_state is None:
            return out, None
        return out, {"conv": conv_state, **cell_state._asdict()}

    def forget_gates(self, x: Tensor, segments: Segments, state: BlockState | None) -> Tensor:
        """log f = log sigmoid(fgate) [N, H] of each row, in float32 or float64; arguments as in `forward`."""
        (*_, fgate), _, _, _ = self._cell_inputs(x, segments, state, False)
        return logsigmoid(fgate)

    def _cell_inputs(
        self, x: Tensor, segments: Segments, state: BlockState | None, return_state: bool
    ) -> tuple[Projections, Tensor, Tensor, Tensor | None]:
        """q, k, v, igate and fgate; the convolved branch; g; and, if asked for, the state of the convolution."""
        branch, gate = self.up_proj(self.norm(x, segments), segments).chunk(2, dim=-1)
        convolved, conv_state = self.conv(branch, segments, state["conv"] if state else None, return_state)
        projections = mlstm_projections(
            convolved,
            branch,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            self.gate_weight,
            self.gate_bias,
            segments.row_offsets,
            backend=self.backend,
        )
        return projections, convolved, gate, conv_state

    def step(self, x: Tensor, experts: Tensor, weights: Tensor, first: int, state: BlockState, out: Tensor) -> None:
        """Adds weights[n, k] f_{experts[n, k] - first}(x_n) to out [N, D] for one token of each of a few rows, in C++.

        x [N, D] and out are float32 or float64, experts and weights [N, K]; a state [N, E, ...] of every block changes
        in place. See `moxe.ops.mlstm.step`.
        """
        if self.ffn is None:
            self._step_cell(x, experts, weights, first, state, out)
            return
        last = first + len(self.skip)
        for chosen, weight in zip(experts.unbind(1), weights.unbind(1), strict=True):
            # A choice by itself with weight 1: the feed-forward part reads what the cell adds to x before any weight.
            cell_out = torch.zeros_like(x)
            self._step_cell(x, chosen[:, None], torch.ones_like(weight)[:, None], first, state, cell_out)
            order = chosen.argsort(stable=True)
            row = order[(chosen[order] >= first) & (chosen[order] < last)]
            lengths = (chosen[row] - first).bincount(minlength=last - first).tolist()
            segments = Segments.from_lengths(lengths, group_offsets=tuple(range(len(lengths) + 1)))
            added = self.ffn((x + cell_out)[row], segments, None, False)[0]
            out.index_add_(0, row, weight[row, None].to(out.dtype) * (cell_out[row] + added))

    def _step_cell(
        self, x: Tensor, experts: Tensor, weights: Tensor, first: int, state: BlockState, out: Tensor
    ) -> None:
        """`step` of what lies before the feed-forward part."""
        parameters = parameters_of(self, _PARAMETERS_OF_STEP)
        mlstm_step(x, experts, weights, first, parameters, self.num_heads, self.norm_eps, state, out)
