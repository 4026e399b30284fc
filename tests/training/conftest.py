"""A tiny model, rows of unequal documents and a trainer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.metrics import MetricsFile
from moxe.recipe import load_recipe
from moxe.training.run import training_arguments
from moxe.training.trainer import MoxETrainer

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 1,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., MoxETrainer]:
    """A trainer in `tmp_path`; keywords are settings of the `training` section, `model` and `rows` aside."""

    def make(*, model: Any = None, rows: int = 8, metrics: MetricsFile | None = None, **settings: Any) -> MoxETrainer:
        defaults = {"batch_size": 4, "logging_steps": 1, "eval_steps": 0, "save_steps": 0}
        recipe = load_recipe("default", {"training": {**defaults, **settings, "output_dir": str(tmp_path)}})
        return MoxETrainer(
            training=recipe.training,
            metrics=metrics,
            model=tiny_model() if model is None else model,
            args=training_arguments(recipe),
            train_dataset=Rows(rows),
            eval_dataset=Rows(5, seed=1),
            data_collator=default_data_collator,
        )

    return make
