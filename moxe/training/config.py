"""The `training` section of a recipe. Every default of a training run is written here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from moxe.errors import UserError, shown

Schedule = Literal["cosine", "wsd"]
OnNonfinite = Literal["stop", "skip"]
MatmulPrecision = Literal["highest", "high", "medium"]
Reporter = Literal["tensorboard", "wandb"]


@dataclass
class TrainingConfig:
    """How a model is trained and what the run writes.

    Args:
        output_dir: folder of all runs; this run writes `<output_dir>/<name>/`.
        name: name of the run; None: the name of the recipe.
        seed: seed of the weights, the order of documents and the order of rows.
        batch_size: rows in one forward pass on one device.
        gradient_accumulation_steps: forward passes in one optimiser step.
        max_steps: optimiser steps; -1: as many as `num_epochs` (or, for streamed data, `data.max_tokens`) gives.
        num_epochs: passes over the training data; may be a fraction.
        learning_rate: peak of the schedule.
        min_learning_rate_ratio: end of the schedule as a share of its peak.
        weight_decay: of AdamW, on the matrices of `decays_weight` (moxe/training/optimizer.py) alone.
        beta1, beta2: of AdamW.
        max_grad_norm: the gradient is scaled down to this norm; 0: never.
        on_nonfinite: what a step does whose loss or gradient is not finite: `stop` ends the run before its update;
            `skip` makes no update (weights and optimiser stay as they are) and goes on with the next step.
        spike_sigmas: an update is skipped too if its language-model loss lies more than this many standard deviations
            above the mean of the recent steps'; 0: never.
        max_skips_in_a_row: skipped updates without one that was made in between, of each of the two causes. One more
            that is not finite ends the run; one more spike is taken for the new level, and its update is made.
        schedule: `cosine`, or `wsd`: warm-up, constant, then a cosine decay over the last `decay_ratio`.
        warmup_ratio: share of the steps with a linear warm-up from 0.
        decay_ratio: share of the steps that `wsd` decays over.
        bf16: bfloat16 autocast; weights, optimiser and cells stay float32.
        float32_matmul_precision: what `torch.set_float32_matmul_precision` is given.
        logging_steps: steps between two lines of metrics.jsonl.
        eval_steps: steps between two validations; 0: only at the end.
        save_steps: steps between two checkpoints to resume from; 0: only at the end, and when the run is stopped.
        save_total_limit: of the checkpoints, the last so many are kept; with 1 none is left if that one is damaged.
        save_best: also save, and keep, the checkpoint of the lowest validation loss.
        report_to: any of `tensorboard`, `wandb`; metrics.jsonl is always written.
        num_threads: threads of torch on a CPU; None: torch's choice.
        deterministic: on a GPU, only operations that give the same bits each time, so that a resumed run ends with
            the same weights as one that was not stopped; on a CPU that is so in any case.
        sample_prompt: beginning of the text that is generated at the end; None: the first words of a held-out
            document.
        sample_tokens: length of that text in tokens; 0: none.

    Raises:
        UserError: for a value out of range, naming it.
    """

    output_dir: str = "runs"
    name: str | None = None
    seed: int = 0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_steps: int = -1
    num_epochs: float = 1.0
    learning_rate: float = 3e-3
    min_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    on_nonfinite: OnNonfinite = "stop"
    spike_sigmas: float = 0.0
    max_skips_in_a_row: int = 5
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.1
    decay_ratio: float = 0.2
    bf16: bool = False
    float32_matmul_precision: MatmulPrecision = "highest"
    logging_steps: int = 10
    eval_steps: int = 200
    save_steps: int = 500
    save_total_limit: int = 2
    save_best: bool = False
    report_to: list[Reporter] = field(default_factory=list)
    num_threads: int | None = None
    deterministic: bool = False
    sample_prompt: str | None = None
    sample_tokens: int = 100

    def __post_init__(self) -> None:
        for key in (
            "batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_total_limit",
            "max_skips_in_a_row",
        ):
            self._require(key, getattr(self, key) >= 1, "at least 1")
        counts = ("seed", "eval_steps", "save_steps", "sample_tokens")
        for key in (*counts, "weight_decay", "max_grad_norm", "spike_sigmas"):
            self._require(key, 0 <= getattr(self, key) < math.inf, "at least 0")
        for key in ("learning_rate", "num_epochs"):
            self._require(key, 0 < getattr(self, key) < math.inf, "a finite number above 0")
        for key in ("min_learning_rate_ratio", "warmup_ratio", "decay_ratio"):
            self._require(key, 0 <= getattr(self, key) <= 1, "between 0 and 1")
        for key in ("beta1", "beta2"):
            self._require(key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")
        self._require("max_steps", self.max_steps == -1 or self.max_steps >= 1, "at least 1, or -1 to go by num_epochs")
        self._require("num_threads", self.num_threads is None or self.num_threads >= 1, "at least 1, or null")
        self._require("seed", self.seed < 2**32, "below 2**32")
        self._require("name", self.name is None or _is_folder_name(self.name), "a folder name without a slash")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise UserError(
                f"training.warmup_ratio={self.warmup_ratio} and training.decay_ratio={self.decay_ratio} are more than "
                "the whole run together"
            )

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"training.{key}={shown(getattr(self, key))} must be {expected}")


def _is_folder_name(name: str) -> bool:
    return bool(name.strip()) and "/" not in name and "\\" not in name and name not in (".", "..")
