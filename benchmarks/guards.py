"""What the guards of training cost: steps of two trainers in turn, one without them.

    python benchmarks/guards.py [--steps N] [--threads N]

Model, batch and schedule are those of the default recipe (B 8, S 128, vocabulary 4,096) on random tokens, with every
guard on and a line of metrics every 10 steps. Both trainers must end with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import Trainer

from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.metrics import LOSS_TERMS
from moxe.ops.cpu.allocator import keep_freed_memory
from moxe.recipe import load_recipe
from moxe.training.gradients import gradient_norms, part_norms, total_norm
from moxe.training.guard import NEEDED, WINDOW, UpdateGuard
from moxe.training.run import training_arguments
from moxe.training.tokens import require_known_tokens
from moxe.training.trainer import MoxETrainer

VOCABULARY, LENGTH = 4096, 128


class Unguarded(MoxETrainer):
    """Checks and clips as transformers' Trainer does."""

    _clip_grad_norm = Trainer._clip_grad_norm
    _get_grad_norm = Trainer._get_grad_norm
    _prepare_inputs = Trainer._prepare_inputs


def make_trainer(kind: type[MoxETrainer], folder: str) -> MoxETrainer:
    recipe = load_recipe(
        "default", {"training": {"on_nonfinite": "skip", "spike_sigmas": 6.0, "eval_steps": 0, "output_dir": folder}}
    )
    torch.manual_seed(0)
    model = MoxEForCausalLM(recipe.model_config(VOCABULARY)).train()
    trainer = kind(model=model, training=recipe.training, args=training_arguments(recipe))
    trainer.create_optimizer()
    return trainer


def step(trainer: MoxETrainer, batch: dict[str, torch.Tensor], is_logged: bool) -> float:
    """One step as the Trainer's loop makes it; the seconds it took."""
    begin = time.perf_counter()
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.training_step(trainer.model, batch, count)
    trainer._get_grad_norm(trainer.model, trainer._clip_grad_norm(trainer.model))
    trainer.optimizer.step()
    trainer.model.zero_grad()
    trainer.state.global_step += 1
    if is_logged and type(trainer) is MoxETrainer:
        part_norms(trainer.norms)
        layers = trainer._statistics(trainer.interval_routing)
        trainer.routing_watch.read(
            trainer.state.global_step, trainer.state.global_step * batch["input_ids"].numel(), layers
        )
    elif is_logged:
        trainer._statistics(trainer.interval_routing)
    return time.perf_counter() - begin


def microseconds(action: Callable[[], object], calls: int = 100) -> float:
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {"guarded": make_trainer(MoxETrainer, folder), "unguarded": make_trainer(Unguarded, folder)}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(arguments.steps):
            ids = torch.randint(0, VOCABULARY, (8, LENGTH), generator=generator)
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            # Who goes first alternates: the second finds the caches as the first left them.
            for name in sorted(trainers, reverse=bool(number % 2)):
                seconds[name].append(step(trainers[name], dict(batch), number % 10 == 9))
    guarded, unguarded = (dict(trainer.model.named_parameters()) for trainer in trainers.values())
    assert all(torch.equal(weight, unguarded[name]) for name, weight in guarded.items()), "the weights differ"
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    differences = [a / b - 1 for a, b in zip(seconds["guarded"][2:], seconds["unguarded"][2:], strict=True)]
    print(f"weights after {arguments.steps} steps are the same, bit for bit")
    print(
        f"a step takes {medians['guarded'] * 1e3:.1f} ms guarded, {medians['unguarded'] * 1e3:.1f} ms unguarded; ",
        end="",
    )
    print(f"median of the differences {statistics.median(differences):+.2%}")

    model = trainers["guarded"].model
    losses = dict.fromkeys(LOSS_TERMS, 1.0)
    guard = UpdateGuard(trainers["guarded"].training)
    for _ in range(WINDOW + NEEDED):
        guard.judge(losses, 1.0)
    model(**batch).loss.backward()
    norms = gradient_norms(model)
    parameters = list(model.parameters())
    pieces = {
        "known tokens, each batch": lambda: require_known_tokens(batch, VOCABULARY, "a batch"),
        "verdict with a full window, each step": lambda: guard.judge(losses, 1.0),
        "norms of the gradients, each step": lambda: total_norm(gradient_norms(model)),
        "the same by torch, which they replace": lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters]),
        "norms by part, each line": lambda: part_norms(norms),
    }
    for name, action in pieces.items():
        spent = microseconds(action)
        print(f"{name:<40}{spent:>8.0f} us  {spent / 1e6 / medians['unguarded']:.3%} of a step")


if __name__ == "__main__":
    main()
