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

    def assignments(self) -> Tensor:
        """[E] int64: how many tokens each expert received; columns without a token (-1) count for nothing."""
        chosen = self.expert_indices[self.expert_indices >= 0]
        return torch.bincount(chosen, minlength=self.logits.shape[-1])


class Router(nn.Module):
    """Chooses k of E experts for each token; experts 0 to E/2 - 1 are group M, the rest group S.

    With `load_balancing="bias"` a bias [E] is added to the probabilities for the choice alone; it is no parameter but
    a buffer, moved by `move_balancing_bias`. The weights are those of equation 9 all the same.
    """

    balancing_bias: Tensor | None

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
        load_balancing: str,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.bias_kind, self.gamma, self.difficulty_threshold = bias_kind, gamma, difficulty_threshold
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if router_bias else None
        has_difficulty = router_kind == "entropy"
        self.difficulty_weight = nn.Parameter(torch.empty(hidden_size)) if has_difficulty else None
        self.difficulty_bias = nn.Parameter(torch.empty(1)) if has_difficulty else None
        self.register_buffer("balancing_bias", torch.zeros(num_experts) if load_balancing == "bias" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = small_init_std(self.weight.shape[1])
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.difficulty_weight is not None and self.difficulty_bias is not None:
            nn.init.normal_(self.difficulty_weight, std=std)
            nn.init.zeros_(self.difficulty_bias)
        if self.balancing_bias is not None:
            nn.init.zeros_(self.balancing_bias)

    def forward(self, h: Tensor) -> RouterOutput:
        """Routes h [N, D]; in the precision of the parameters also under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.weight.dtype)
            unbiased = F.linear(h, self.weight, self.bias)
            difficulty, logits = None, unbiased
            if self.difficulty_weight is not None and self.difficulty_bias is not None:
                difficulty = torch.sigmoid(h @ self.difficulty_weight + self.difficulty_bias)
                logits = unbiased + self._modulation_bias(difficulty)
            probabilities = torch.softmax(logits, dim=-1)
            if self.balancing_bias is None:
                top = probabilities.topk(self.num_experts_per_tok, dim=-1)
                indices, weights = top.indices, top.values / top.values.sum(-1, keepdim=True)
            else:
                scores = probabilities.detach() + self.balancing_bias
                indices = scores.topk(self.num_experts_per_tok, dim=-1).indices
                # The chosen probabilities, renormalised; finite also where the bias chose experts whose own are all 0.
                weights = torch.softmax(logits.gather(-1, indices), dim=-1)
        return RouterOutput(logits, unbiased, difficulty, indices, weights)

    @torch.no_grad()
    def move_balancing_bias(self, assignments: Tensor, rate: float) -> None:
        """b_e += rate sign(mean load - load_e) for the assignments [E] of a step."""
        assert self.balancing_bias is not None
        load = assignments.double()  # exact, so that an equal load moves nothing
        self.balancing_bias += (rate * torch.sign(load.mean() - load)).to(self.balancing_bias)

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
