"""A tiny run: its text, its recipe, and what a finished one looks like."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moxe.observability.metrics import read_metrics
from moxe.recipe import Recipe, load_recipe
from moxe.training.checkpoint import Checkpoints, read_json
from moxe.training.run import RunResult
from tests.training.tiny import TINY

WORDS = "the cat sat on a mat and saw that dogs ran far over hills to find one small red hat in rain"
ALL_STEPS = [
    (1, "training"),
    (2, "training"),
    (2, "validation"),
    (3, "training"),
    (4, "training"),
    (4, "validation"),
]


@dataclass(frozen=True)
class Finished:
    recipe: Recipe
    result: RunResult
    printed: str


def write_text(path: Path) -> Path:
    """Forty documents of thirty words."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(40):
        words = WORDS.split()
        choice = torch.randint(len(words), (30,), generator=generator)
        documents.append(" ".join(words[index] for index in choice.tolist()))
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    return path


def tiny_recipe(text_file: Path, output_dir: Path, **training: Any) -> Recipe:
    model = {key: value for key, value in TINY.items() if key not in ("vocab_size", "pad_token_id")}
    return load_recipe("default", {"model": model, **tiny_sections(text_file, output_dir, **training)})


def tiny_sections(text_file: Path, output_dir: Path, **training: Any) -> dict[str, dict[str, Any]]:
    """The sections `data` and `training` of a recipe that takes a second."""
    data = {
        "source": str(text_file),
        "cache_dir": str(text_file.parent / "cache"),
        "vocab_size": 300,
        "sequence_length": 32,
        "validation_fraction": 0.2,
    }
    defaults = {
        "output_dir": str(output_dir),
        "batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "num_threads": 1,
        "sample_prompt": None,
        "sample_tokens": 5,
    }
    return {"data": data, "training": {**defaults, **training}}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def logged_steps(folder: Path) -> list[tuple[int, str]]:
    """What metrics.jsonl holds, line by line."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(record["step"], "training" if "layers" in record else "validation") for record in records]


def timeless_metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times, in which no two runs are alike."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same weights, optimiser, schedule and random numbers, bit for bit, the same lines of metrics.jsonl, and the
    same of all else that a checkpoint remembers."""
    assert timeless_metrics(run) == timeless_metrics(expected)
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    last, last_expected = Checkpoints(run).all()[0], Checkpoints(expected).all()[0]
    assert last.step == last_expected.step
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (last.path / name).read_bytes() == (last_expected.path / name).read_bytes(), name
    progress, expected_progress = timeless_progress(last.path), timeless_progress(last_expected.path)
    if progress["validation_is_due"]:  # at the last step: the checkpoint is from before the validation was made up
        for name in ("validation_is_due", "best_metric", "best_global_step"):
            del progress[name], expected_progress[name]
    assert progress == expected_progress


def timeless_progress(checkpoint: Path) -> dict[str, Any]:
    """What the trainer's checkpoint remembers beside torch's states, without its times and intervals."""
    progress = read_json(checkpoint / "progress.json")
    del progress["seconds"], progress["interval"]["seconds"]
    state = read_json(checkpoint / "trainer_state.json")
    kept = ("global_step", "epoch", "num_input_tokens_seen", "best_metric", "best_global_step", "max_steps")
    return {**progress, **{name: state[name] for name in kept}}
