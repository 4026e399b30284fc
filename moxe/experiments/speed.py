"""Speed of each row on a quiet machine: all rows in one process, in turn, so that they meet the same machine.

Runs of a grid share the machine with each other, so their own seconds say little.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moxe.benchmarks.machine import describe_machine
from moxe.benchmarks.timing import time_in_turn
from moxe.experiments.grid import Run
from moxe.files import write_whole
from moxe.models.architectures import build_model
from moxe.ops.cpu.allocator import keep_freed_memory

SPEED = "speed.json"
GENERATED_TOKENS = 32
_REPEATS = 5


def measure_speed(runs: Sequence[Run], vocab_size: int, out: Path) -> dict[str, dict[str, Any]]:
    """Training and generation of each row, by its name: what speed.json of `out` then holds.

    Each entry has `tokens_per_second`, of a training step on a batch of the recipe's size; and
    `seconds_a_generated_token`, of one sequence that goes on from a prompt of the recipe's row length, whose reading
    counts. All rows are measured again unless every one of them has been.

    Args:
        runs: one of each row.
        vocab_size: of the tokenizer.
        out: the folder of the results.
    """
    path = out / SPEED
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(known.get(run.row.name, {}).get("run") != run.folder.name for run in runs):
        context = multiprocessing.get_context("forkserver")
        with context.Pool(1) as pool:  # in a process of its own, which has its own threads and memory
            known.update(pool.apply(_measure, (runs, vocab_size)))
        write_whole(path, json.dumps(known, indent=2) + "\n")
    return known


def _measure(runs: Sequence[Run], vocab_size: int) -> dict[str, dict[str, Any]]:
    keep_freed_memory()
    training = runs[0].recipe.training
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, length = training.batch_size, runs[0].recipe.data.sequence_length
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    names = [run.row.name for run in runs]
    models = [_model(run, vocab_size, device) for run in runs]
    steps = {name: _training_step(model, ids, training.bf16) for name, model in zip(names, models, strict=True)}
    trained = time_in_turn(steps, repeats=_REPEATS)
    generations = {name: _generation(model, ids[:1]) for name, model in zip(names, models, strict=True)}
    generated = time_in_turn(generations, repeats=_REPEATS)
    return {
        run.row.name: {
            "run": run.folder.name,
            "tokens_per_second": ids.numel() / trained[run.row.name].median,
            "seconds_a_generated_token": generated[run.row.name].median / GENERATED_TOKENS,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else describe_machine()["cpu"],
        }
        for run in runs
    }


def _model(run: Run, vocab_size: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    return build_model(run.recipe.model_config(vocab_size)).to(device)


def _training_step(model: nn.Module, ids: Tensor, bf16: bool) -> Callable[[], None]:
    """A training step on the same random tokens each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(ids)

    return step


def _generation(model: Any, prompt: Tensor) -> Callable[[], None]:
    """The most probable `GENERATED_TOKENS` tokens behind the prompt."""
    length = {"min_new_tokens": GENERATED_TOKENS, "max_new_tokens": GENERATED_TOKENS}

    def generate() -> None:
        model.eval()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)
        _wait(prompt)

    return generate


def _wait(on: Tensor) -> None:
    """Until the device has done its work."""
    if on.device.type == "cuda":
        torch.cuda.synchronize()
