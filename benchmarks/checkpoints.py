"""What checkpoints cost a training run.

    python benchmarks/checkpoints.py [RECIPE] [--saves N] [--section.key VALUE …]

Trains the recipe with a checkpoint every few steps and takes the time of each save apart: writing the files, handing
them to the disk with their SHA-256, removing the one before. The cost is a save's median time divided by the time of
the steps between two saves as the recipe has them. Beside it stands the floor: the same bytes written to the same disk
in one file. At the end every file is verified, and the weights are compared with those of the finished run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moxe.cli import split_overrides
from moxe.files import sync
from moxe.observability.metrics import read_metrics
from moxe.ops.cpu.allocator import keep_freed_memory
from moxe.recipe import load_recipe
from moxe.training.checkpoint import Checkpoints
from moxe.training.run import train
from moxe.training.trainer import MoxETrainer

STEPS_BETWEEN = 5


def main() -> None:
    arguments, overrides = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="default")
    parser.add_argument("--saves", type=int, default=12)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    recipe = load_recipe(options.recipe, overrides)
    steps_between_saves = recipe.training.save_steps
    with tempfile.TemporaryDirectory(dir=".") as folder:
        training = recipe.training
        training.output_dir, training.sample_tokens, training.eval_steps = folder, 0, 0
        training.save_steps, training.max_steps = STEPS_BETWEEN, STEPS_BETWEEN * options.saves
        training.logging_steps = 1
        seconds: dict[str, list[float]] = defaultdict(list)
        timed(MoxETrainer, "_save_checkpoint", seconds["save"])
        timed(MoxETrainer, "_write_checkpoint", seconds["write the files"])
        timed(Checkpoints, "finish", seconds["to the disk, SHA-256"])
        timed(Checkpoints, "prune", seconds["remove the one before"])
        run = train(recipe).path
        last = Checkpoints(run).newest()[0]
        assert last is not None
        assert (last.path / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        size = sum(path.stat().st_size for path in last.path.iterdir())
        floors = [write_once(Path(folder), size) for _ in range(options.saves)]
        records = [record for record in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in record]
    tokens = records[-1]["tokens"] / records[-1]["step"]
    step = statistics.median(tokens / record["tokens_per_second"] for record in records)
    save = statistics.median(seconds["save"])
    print(f"\na step {1000 * step:,.0f} ms; a checkpoint {size / 1e6:,.1f} MB, {len(seconds['save'])} of them:")
    for name, values in seconds.items():
        low, high = 1000 * min(values), 1000 * max(values)
        print(f"  {name:<22} {1000 * statistics.median(values):7.1f} ms  ({low:.1f}-{high:.1f})")
    print(f"  {'floor: one file':<22} {1000 * statistics.median(floors):7.1f} ms")
    print(f"cost at a save every {steps_between_saves} steps: {100 * save / (steps_between_saves * step):.2f}%")


def timed(owner: type, name: str, seconds: list[float]) -> None:
    """Add the time of each call of a method to `seconds`."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def write_once(folder: Path, size: int) -> float:
    path, content = folder / "floor", os.urandom(size)
    start = time.perf_counter()
    path.write_bytes(content)
    sync(path)
    elapsed = time.perf_counter() - start
    path.unlink()
    return elapsed


if __name__ == "__main__":
    main()
