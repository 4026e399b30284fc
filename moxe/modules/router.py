"""The entropy-aware router: difficulty, modulation bias, top-k choice (equations 5 to 9).

Legend: N packed tokens, D hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moxe.modules.stacks import small_init_std


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What a router decided; leading dimensions [N] inside the model and [B, S] in its output."""

    logits: Tensor  # [..., E] adjusted (7)
    unbiased_logits: Tensor  # [..., E]
    difficulty: Tensor | None  # [...], in (0, 1) (5); None for the standard router
    expert_indices: Tensor  # [..., K] int64
    expert_weights: Tensor  # [..., K], sums to 1


class Router(nn.Module):
    """Chooses k of E experts for each token; experts 0 to E/2 - 1 are group M, the rest group S."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        router_kind: str,
        bias_kind: str,
        gamma: float,
        difficulty_threshold: float,
        router_bias: bool,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.bias_kind, self.gamma, self.difficulty_threshold = bias_kind, gamma, difficulty_threshold
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if router_bias else None
        has_difficulty = router_kind == "entropy"
        self.difficulty_weight = nn.Parameter(torch.empty(hidden_size)) if has_difficulty else None
        self.difficulty_bias = nn.Parameter(torch.empty(1)) if has_difficulty else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = small_init_std(self.weight.shape[1])
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.difficulty_weight is not None and self.difficulty_bias is not None:
            nn.init.normal_(self.difficulty_weight, std=std)
            nn.init.zeros_(self.difficulty_bias)

    def forward(self, h: Tensor) -> RouterOutput:
        """Routes h [N, D]; in the precision of the parameters also under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.weight.dtype)
            unbiased = F.linear(h, self.weight, self.bias)
            difficulty, logits = None, unbiased
            if self.difficulty_weight is not None and self.difficulty_bias is not None:
                difficulty = torch.sigmoid(h @ self.difficulty_weight + self.difficulty_bias)
                logits = unbiased + self._modulation_bias(difficulty)
            top = torch.softmax(logits, dim=-1).topk(self.num_experts_per_tok, dim=-1)
            weights = top.values / top.values.sum(-1, keepdim=True)
        return RouterOutput(logits, unbiased, difficulty, top.indices, weights)

    def _modulation_bias(self, difficulty: Tensor) -> Tensor:
        """[N, E]: +strength for group M, -strength for group S (6)."""
        if self.bias_kind == "standard":
            strength = self.gamma * difficulty
        elif self.bias_kind == "proportional":
            strength = self.gamma * F.relu(difficulty - self.difficulty_threshold)
        else:
            strength = self.gamma * difficulty * (difficulty > self.difficulty_threshold)
        half = len(self.weight) // 2
        sign = torch.cat([difficulty.new_ones(half), -difficulty.new_ones(half)])
        return strength[:, None] * sign
