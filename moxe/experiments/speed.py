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
from moxe.benchmarks.timing import Samples, time_in_turn
from moxe.experiments.grid import Run
from moxe.files import write_whole
from moxe.models.architectures import build_model
from moxe.ops.cpu.allocator import keep_freed_memory
from moxe.training.run_folder import read_json_object

SPEED = "speed.json"
GENERATED_TOKENS = 128
_REPEATS = 9
_ROWS_AT_ONCE = 5


def measure_speed(runs: Sequence[Run], vocab_size: int, out: Path) -> dict[str, dict[str, Any]]:
    """Training and generation of each row, by its name: what speed.json of `out` then holds.

    Each entry has `tokens_per_second`, of a training step on a batch of the recipe's size; and
    `seconds_a_generated_token`, of one sequence behind a prompt of the recipe's row length, whose reading does not
    count. All rows are measured again unless every one of them has been.

    Args:
        runs: one of each row.
        vocab_size: of the tokenizer.
        out: the folder of the results.
    """
    path = out / SPEED
    known = read_json_object(path) or {}
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
    trained: dict[str, Samples] = {}
    first: dict[str, Samples] = {}
    generated: dict[str, Samples] = {}
    for begin in range(0, len(runs), _ROWS_AT_ONCE):  # so that models of the paper's size fit into memory
        models = {run.row.name: _model(run, vocab_size, device) for run in runs[begin : begin + _ROWS_AT_ONCE]}
        for taken, side in (
            (trained, lambda model: _training_step(model, ids, training.bf16)),
            (first, lambda model: _generation(model, ids[:1], 1)),
            (generated, lambda model: _generation(model, ids[:1], 1 + GENERATED_TOKENS)),
        ):
            taken |= time_in_turn({name: side(model) for name, model in models.items()}, repeats=_REPEATS)
    return {
        run.row.name: {
            "run": run.folder.name,
            "tokens_per_second": ids.numel() / trained[run.row.name].median,
            "seconds_a_generated_token": (generated[run.row.name].median - first[run.row.name].median)
            / GENERATED_TOKENS,
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


def _generation(model: Any, prompt: Tensor, tokens: int) -> Callable[[], None]:
    """The most probable tokens behind the prompt."""
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}

    def generate() -> None:
        model.eval()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)
        _wait(prompt)

    return generate


def _wait(on: Tensor) -> None:
    """Until the device has done its work."""
    if on.device.type == "cuda":
        torch.cuda.synchronize()
