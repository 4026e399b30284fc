"""A grid whose runs are never made: enough to ask for recipes, keys and folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moxe.experiments.grid import Data, Grid, Run
from moxe.experiments.scales import load_scale

DATA = Data(fingerprint="f" * 64, vocab_size=1024, lambada=("the last word",), lambada_source="texts.jsonl")


@pytest.fixture
def make_grid(tmp_path: Path) -> Callable[..., Grid]:
    def make(scale: str = "small", seeds: int = 3, overrides=(), data: Data = DATA, out: Path = tmp_path) -> Grid:
        return Grid(load_scale(scale), seeds, list(overrides), data, out)

    return make


@pytest.fixture
def pretend() -> Callable[[Run, float], None]:
    """Write what a finished run would: enough for whoever looks at its validation loss."""

    def finish(run: Run, loss: float) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "evaluation.json").write_text(json.dumps({"validation": {"loss": loss}}))

    return finish
