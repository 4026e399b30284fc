"""Training speed of each row on a quiet machine: all rows in one process, in turn, so that they meet the same machine.

Runs of a grid share the machine with each other, so their own seconds say little.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moxe.benchmarks.machine import describe_machine
from moxe.benchmarks.timing import time_in_turn
from moxe.experiments.grid import Run
from moxe.files import write_whole
from moxe.models.architectures import build_model

SPEED = "speed.json"
_REPEATS = 5


def measure_speed(runs: Sequence[Run], vocab_size: int, out: Path) -> dict[str, dict[str, Any]]:
    """Tokens a second of a training step of each row, by its name; what `out` holds already is not measured again.

    Args:
        runs: one of each row.
        vocab_size: of the tokenizer.
        out: the folder whose speed.json is completed.
    """
    path = out / SPEED
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [run for run in runs if known.get(run.row.name, {}).get("run") != run.folder.name]
    if missing:
        context = multiprocessing.get_context("forkserver")
        with context.Pool(1) as pool:  # in a process of its own, which has its own threads and memory
            known.update(pool.apply(_measure, (runs, vocab_size)))
        write_whole(path, json.dumps(known, indent=2) + "\n")
    return known


def _measure(runs: Sequence[Run], vocab_size: int) -> dict[str, dict[str, Any]]:
    training = runs[0].recipe.training
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, length = training.batch_size, runs[0].recipe.data.sequence_length
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    steps = {run.row.name: _step(run, vocab_size, ids, training.bf16) for run in runs}
    samples = time_in_turn(steps, repeats=_REPEATS)
    return {
        run.row.name: {
            "run": run.folder.name,
            "tokens_per_second": ids.numel() / samples[run.row.name].median,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else describe_machine()["cpu"],
        }
        for run in runs
    }


def _step(run: Run, vocab_size: int, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """A training step on the same random tokens each time."""
    torch.manual_seed(0)
    model = build_model(run.recipe.model_config(vocab_size)).to(ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    return step
