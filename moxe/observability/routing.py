"""What the routers do: load, difficulty, entropy and group share of every layer, over any number of batches.

Legend: B rows, S tokens, E experts, K experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moxe.modules.losses import normalised_entropy
from moxe.modules.router import RouterOutput
from moxe.observability.metrics import RoutingStatistics


class RoutingMeter:
    """Adds up the routing of batches; every token weighs the same, whatever batch it came in."""

    # Columns of the sums beside the E assignment counts.
    _TOKENS, _DIFFICULTY, _DIFFICULTY_SQUARED, _ENTROPY = range(4)

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.sums: Tensor | None = None  # [L, 4 + E], float64 on the CPU
        self.has_difficulty = True

    def reset(self) -> None:
        self.sums = None

    @torch.no_grad()
    def add(self, routing: Sequence[RouterOutput], attention_mask: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            routing: the model's `routing`: one object a layer, with leading dimensions [B, S].
            attention_mask: [B, S], 0 where there is no token.
        """
        sums = torch.stack([self._layer_sums(layer, attention_mask) for layer in routing]).cpu().double()
        self.has_difficulty = all(layer.difficulty is not None for layer in routing)
        self.sums = sums if self.sums is None else self.sums + sums

    def _layer_sums(self, layer: RouterOutput, attention_mask: Tensor | None) -> Tensor:
        logits = layer.unbiased_logits.float()
        mask = logits.new_ones(logits.shape[:-1]) if attention_mask is None else attention_mask.to(logits)
        entropy = normalised_entropy(logits)
        difficulty = torch.zeros_like(mask) if layer.difficulty is None else layer.difficulty.float()
        experts = torch.arange(self.num_experts, device=logits.device)
        assignments = (layer.expert_indices.unsqueeze(-1) == experts).flatten(0, -2).sum(0)
        per_token = torch.stack([torch.ones_like(mask), difficulty, difficulty.square(), entropy])
        return torch.cat([(per_token * mask).flatten(1).sum(1), assignments])

    def compute(self) -> list[RoutingStatistics]:
        """The statistics of each layer over everything added since the last reset; [] if nothing was."""
        if self.sums is None:
            return []
        statistics = []
        for layer in self.sums:
            of_tokens, counts = layer[:4], layer[4:]
            means = of_tokens / of_tokens[self._TOKENS]
            mean = means[self._DIFFICULTY].item()
            load = counts / counts.sum()
            statistics.append(
                RoutingStatistics(
                    load=load.tolist(),
                    difficulty_mean=mean if self.has_difficulty else None,
                    difficulty_variance=(
                        # max() would turn a NaN into 0
                        (means[self._DIFFICULTY_SQUARED] - mean**2).clamp(min=0).item() if self.has_difficulty else None
                    ),
                    router_entropy=means[self._ENTROPY].item(),
                    mlstm_share=load[: self.num_experts // 2].sum().item(),
                )
            )
        return statistics


def routing_statistics(
    routing: Sequence[RouterOutput], num_experts: int, attention_mask: Tensor | None = None
) -> list[RoutingStatistics]:
    """The statistics of one forward pass, one object a layer (see `RoutingMeter.add` for the shapes)."""
    meter = RoutingMeter(num_experts)
    meter.add(routing, attention_mask)
    return meter.compute()


def combine_routing(parts: Sequence[RouterOutput], function: Callable[[list[Tensor]], Tensor]) -> RouterOutput:
    """One routing of several: each tensor is what `function` makes of the parts' tensors of its name."""
    difficulties = [part.difficulty for part in parts if part.difficulty is not None]
    return RouterOutput(
        logits=function([part.logits for part in parts]),
        unbiased_logits=function([part.unbiased_logits for part in parts]),
        difficulty=function(difficulties) if difficulties else None,
        expert_indices=function([part.expert_indices for part in parts]),
        expert_weights=function([part.expert_weights for part in parts]),
    )
