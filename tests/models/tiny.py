"""Models small enough to be held against plain loops, with weights that leave nothing at 0 or 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "qkv_block_size": 8,
}
EXPERT_KINDS = ("xlstm", "mlstm", "slstm", "ffn")
EXPERT_MEMORIES = ("sequence", "token")
# The options beyond the paper, each where it changes what a model computes; every promise of a model holds with them.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"expert_kind": "ffn", "ffn_residual": False},
    {"mlstm_ffn_expansion": 1.3},
    {"load_balancing": "bias"},
    {"shared_expert": "ffn", "expert_memory": "token"},
    {"shared_expert": "mlstm", "mlstm_ffn_expansion": 1.3, "expert_memory": "token"},
    {"shared_expert": "slstm"},
    {"shared_expert": "slstm", "expert_kind": "ffn", "ffn_residual": False, "load_balancing": "bias"},
    {"shared_expert": "ffn", "expert_kind": "ffn", "ffn_residual": False},
)
# Those that change nothing but the losses.
LOSS_OPTIONS: tuple[dict[str, Any], ...] = (
    {"difficulty_target": "token_loss"},
    {"detach_difficulty_target": True},
)


def tiny_config(**settings: Any) -> MoxEConfig:
    return MoxEConfig(**{**TINY, **settings})


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> MoxEForCausalLM:
    """A model in evaluation mode whose every parameter matters: a fresh one has zeros, ones and near-uniform logits.

    The biases of `load_balancing="bias"` too; they stay float32.
    """
    torch.manual_seed(seed)
    model = MoxEForCausalLM(tiny_config(**settings))
    scramble(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for bias in model.buffers():
        bias.normal_(std=0.2, generator=generator)
    return model.eval()


def scramble(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Adds noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def token_ids(rows: int, tokens: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> Tensor:
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
