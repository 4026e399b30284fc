"""A tiny model and rows of unequal documents."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 1,
}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows as packing makes them: two documents each, some labels ignored, the last row padded."""

    def __init__(self, rows: int, tokens: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(2, 64, (rows, tokens), generator=generator)
        self.labels = self.input_ids.clone()
        self.document_ids = (torch.arange(tokens) >= tokens // 2).long().repeat(rows, 1)
        self.attention_mask = torch.ones_like(self.input_ids)
        for row in range(rows):
            self.labels[row, : row % 5] = -100
        self.attention_mask[-1, -4:] = 0
        self.labels[-1, -4:] = -100
        self.document_ids[-1, -4:] = 2

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "document_ids", "attention_mask")
        return {name: getattr(self, name)[index] for name in names}


def tiny_model(**settings: Any) -> MoxEForCausalLM:
    torch.manual_seed(0)
    return MoxEForCausalLM(MoxEConfig(**{**TINY, **settings}))
