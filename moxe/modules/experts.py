"""The experts of a layer: each sees the ordered tokens routed to it, and those of a kind run as one stack (equation 9).

Legend: N packed tokens, D hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moxe.modules.feed_forward import FeedForwardBlocks
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.modules.stacks import BlockState
from moxe.ops.routing import ExpertRows, assign, combine, dispatch
from moxe.ops.segments import Segments

# Reads or writes the state of the given rows of experts; the model's cache provides them.
ReadState = Callable[[str, ExpertRows], BlockState | None]
WriteState = Callable[[str, ExpertRows, BlockState], None]


class Experts(nn.Module):
    """E expert blocks in stacks by kind; children are named by kind: `mlstm`, `slstm`, `ffn`."""

    def __init__(
        self,
        *,
        num_experts: int,
        expert_kind: str,
        expert_memory: str,
        make_block: dict[str, Callable[[int], nn.Module]],
        backend: str,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.backend, self.residual = backend, residual
        self.has_memory = expert_memory == "sequence"
        self.keeps_state = self.has_memory and expert_kind != "ffn"
        half = num_experts // 2
        if expert_kind == "xlstm":
            self.ranges = {"mlstm": (0, half), "slstm": (half, num_experts)}
        else:
            self.ranges = {expert_kind: (0, num_experts)}
        for kind, (first, last) in self.ranges.items():
            self.add_module(kind, make_block[kind](last - first))

    def forward(
        self,
        h: Tensor,
        expert_indices: Tensor,
        expert_weights: Tensor,
        sequences: Segments,
        read_state: ReadState,
        write_state: WriteState | None,
    ) -> Tensor:
        """h + sum_k w_k f_{e_k}(h) [N, D], without `residual` the sum alone; h [N, D], indices and weights [N, K]."""
        assignments = assign(expert_indices, sequences, one_token_segments=not self.has_memory)
        owned = {kind: assignments.of_experts(first, last) for kind, (first, last) in self.ranges.items()}
        rows = dispatch(h, assignments, backend=self.backend)
        parts = rows.split([own.segments.num_tokens for own in owned.values()])
        outputs = []
        for (kind, own), part in zip(owned.items(), parts, strict=True):
            state = read_state(kind, own) if self.keeps_state else None
            block: MLSTMBlocks | SLSTMBlocks | FeedForwardBlocks = getattr(self, kind)
            y, new_state = block(part, own.segments, state, self.keeps_state and write_state is not None)
            if new_state is not None and write_state is not None:
                write_state(kind, own, new_state)
            outputs.append(y)
        residual = h if self.residual else None
        y = combine(torch.cat(outputs), expert_weights, assignments, residual=residual, backend=self.backend)
        return y if self.residual else y.to(h.dtype)  # the stream keeps its precision under autocast

    def step(self, h: Tensor, expert_indices: Tensor, expert_weights: Tensor, states: dict[str, BlockState]) -> Tensor:
        """`forward` for one token of each of a few rows, in C++; the states [N, E, ...] by kind change in place.

        For experts that keep a state; h is float32 or float64.
        """
        out = h.clone()
        for kind, (first, _) in self.ranges.items():
            blocks: MLSTMBlocks | SLSTMBlocks = getattr(self, kind)
            blocks.step(h, expert_indices, expert_weights, first, states[kind], out)
        return out
