"""A trainer of a tiny model, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from moxe.observability.metrics import MetricsFile
from moxe.recipe import load_recipe
from moxe.training.run import training_arguments
from moxe.training.trainer import MoxETrainer
from tests.training.tiny import Rows, tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
