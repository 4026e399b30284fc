"""A trainer of a tiny model and a tiny finished run, on one thread."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import default_data_collator

import moxe.training.run as run_module
from moxe.observability.metrics import MetricsFile
from moxe.recipe import Recipe, load_recipe
from moxe.training.run import train, training_arguments
from moxe.training.trainer import MoxETrainer
from tests.training.runs import Finished, tiny_recipe, write_text
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

    def make(
        *,
        model: Any = None,
        rows: int | Rows = 8,
        metrics: MetricsFile | None = None,
        say: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> MoxETrainer:
        defaults = {"batch_size": 4, "logging_steps": 1, "eval_steps": 0, "save_steps": 0}
        recipe = load_recipe("default", {"training": {**defaults, **settings, "output_dir": str(tmp_path)}})
        return MoxETrainer(
            training=recipe.training,
            metrics=metrics,
            say=say,
            model=tiny_model() if model is None else model,
            args=training_arguments(recipe),
            train_dataset=Rows(rows) if isinstance(rows, int) else rows,
            eval_dataset=Rows(5, seed=1),
            data_collator=default_data_collator,
        )

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="session")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run from beginning to end; only to be read."""
    recipe = tiny_recipe(text_file, tmp_path_factory.mktemp("runs"), save_total_limit=2)
    output = io.StringIO()
    result = train(recipe, Console(file=output, width=100))
    return Finished(recipe, result, output.getvalue())


@pytest.fixture
def make_recipe(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe that writes to `tmp_path`; its run draws no pictures, which take longer than its training."""
    monkeypatch.setattr(run_module, "draw_run", lambda *paths, formats: [])

    def make(**training: Any) -> Recipe:
        return tiny_recipe(text_file, tmp_path, **training)

    return make


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run as the run `default` of `make_recipe`."""
    return Path(shutil.copytree(finished.result.path, tmp_path / "default"))
