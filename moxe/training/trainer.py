"""MoxETrainer: transformers' Trainer with every loss term and the routing of every layer in its logs.

Legend: B rows of a batch, S tokens a row.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from moxe.errors import UserError
from moxe.models.modeling_moxe import MoxECausalLMOutput, MoxEForCausalLM, pack_tokens
from moxe.observability.metrics import LOSS_TERMS, MetricsFile
from moxe.observability.routing import RoutingMeter, RoutingStatistics
from moxe.training.callbacks import LastStep, Throughput
from moxe.training.config import TrainingConfig
from moxe.training.optimizer import decayed_parameter_names, learning_rate_schedule


class LossMeter:
    """Adds up the terms of the loss over forward passes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(LOSS_TERMS), dtype=torch.float64)  # on the CPU

    def add(self, outputs: MoxECausalLMOutput, *, loss_weight: float, router_weight: float) -> None:
        """`loss_weight` is that of the whole loss and of the language-model loss."""
        values = torch.stack([getattr(outputs, term).detach() for term in LOSS_TERMS]).cpu().double()
        weights = [loss_weight if term in ("loss", "lm_loss") else router_weight for term in LOSS_TERMS]
        self.sums += values * torch.tensor(weights, dtype=torch.float64)


class MoxETrainer(Trainer):
    """Trains a MoxE.

    The gradient of one optimiser step is that of the whole batch, however many micro-batches it comes in: the
    language-model loss is the sum over target tokens divided by the number of targets of the whole step, exactly. The
    router losses are nonlinear in the tokens (products of means over them); they are computed for each micro-batch and
    averaged with the micro-batches' shares of the targets.
    """

    def __init__(
        self, *, model: MoxEForCausalLM, training: TrainingConfig, metrics: MetricsFile | None = None, **kwargs: Any
    ) -> None:
        """As Trainer, with the recipe's `training` section and the file to write metrics to."""
        super().__init__(model=model, **kwargs)
        self.training = training
        self.metrics = metrics
        num_experts = model.config.num_experts
        self.interval_losses, self.interval_routing = LossMeter(), RoutingMeter(num_experts)
        self.validation_routing = RoutingMeter(num_experts)
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self.add_callback(LastStep())

    # Optimiser and schedule

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameter_names(name for name, _ in model.named_parameters())

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            scheduled = optimizer or self.optimizer
            assert isinstance(scheduled, torch.optim.Optimizer)
            self.lr_scheduler = learning_rate_schedule(self.training, scheduled, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Targets of all micro-batches of a step, on all devices."""
        return self._reduce(torch.tensor(sum(count_targets(batch) for batch in batch_samples))).to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs, output_router_logits=True, num_items_in_batch=num_items_in_batch)
        # The loss is already a share of the whole step's, but processes average their gradients.
        loss = outputs.loss * self.accelerator.num_processes
        if model.training:
            assert num_items_in_batch is not None  # get_batch_samples counts them
            # The outputs' loss and lm_loss are already this micro-batch's part of the step's; the others are means.
            share = count_targets(inputs) / max(1, int(num_items_in_batch))
            self.interval_losses.add(outputs, loss_weight=1.0, router_weight=share)
            self.interval_routing.add(outputs.routing, inputs.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The norm before clipping. A norm that is not finite ends the run before it reaches the weights."""
        norm = float(torch.as_tensor(super()._get_grad_norm(model, grad_norm)))
        if not math.isfinite(norm):
            step = self.state.global_step + 1
            losses = self._interval_losses(self.throughput.steps + 1)
            self._write({"step": step, "tokens": self.state.num_input_tokens_seen, **losses, "gradient_norm": norm})
            raise UserError(
                f"the gradient norm is {norm} at step {step} (loss {losses['loss']:.4g}): training stopped before the "
                f"weights were touched; try a training.learning_rate below {self.training.learning_rate:g}"
            )
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate (6 x parameters x tokens) is wrong where experts are chosen."""
        return 0

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the line of metrics.jsonl that `logs` belongs to; hand the same numbers to every reporter."""
        if "grad_norm" in logs:
            self._log_training(logs)
        else:
            super().log({key: value for key, value in logs.items() if key != "total_flos"})

    def _log_training(self, logs: dict[str, float]) -> None:
        record = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "tokens": self.state.num_input_tokens_seen,
            "learning_rate": logs["learning_rate"],
            **self._interval_losses(self.throughput.steps),
            "gradient_norm": logs["grad_norm"],
            "tokens_per_second": self.throughput.take(self.state.num_input_tokens_seen),
            "layers": [asdict(layer) for layer in self._statistics(self.interval_routing)],
        }
        self.interval_losses.reset()
        self.interval_routing.reset()
        self._report(record)

    def _interval_losses(self, steps: int) -> dict[str, float]:
        """Each term of the loss, averaged over the `steps` since the last line."""
        means = self._reduce(self.interval_losses.sums) / steps
        return dict(zip(LOSS_TERMS, means.tolist(), strict=True))

    def _statistics(self, meter: RoutingMeter) -> list[RoutingStatistics]:
        if meter.sums is not None:
            meter.sums = self._reduce(meter.sums)
        return meter.compute()

    def _reduce(self, value: Tensor) -> Tensor:
        """Sum of a tensor of the CPU over all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return value
        reduced = self.accelerator.reduce(value.to(self.args.device), "sum")
        assert isinstance(reduced, Tensor)
        return reduced.cpu()

    def _report(self, record: dict[str, Any]) -> None:
        self._write(record)
        super().log({key: value for key, value in flatten(record).items() if key not in ("step", "epoch")})

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    # Validation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Every term of the loss as a mean over target tokens (the Trainer's own loop takes the mean over batches).

        With several processes the last rows may be counted twice, to give each process batches of one size.
        """
        assert self.model is not None
        if not self.accelerator._models:  # validation without training: not prepared yet
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model = self.model_wrapped.eval()
        losses = LossMeter()
        self.validation_routing.reset()
        num_targets = num_rows = 0
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs, output_router_logits=True, logits_to_keep=1)
            count = count_targets(inputs)
            losses.add(outputs, loss_weight=count, router_weight=count)
            self.validation_routing.add(outputs.routing, inputs.get("attention_mask"))
            num_targets += count
            num_rows += len(inputs["input_ids"])
        total = int(self._reduce(torch.tensor(num_targets)))
        means = (self._reduce(losses.sums) / total).tolist()
        metrics = {f"{metric_key_prefix}_{term}": mean for term, mean in zip(LOSS_TERMS, means, strict=True)}
        metrics[f"{metric_key_prefix}_tokens"] = total
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate; also a validation line in metrics.jsonl."""
        metrics = super().evaluate(*args, **kwargs)
        record: dict[str, Any] = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "tokens": self.state.num_input_tokens_seen,
        }
        for term in (*LOSS_TERMS, "tokens"):
            if f"eval_{term}" in metrics:
                record[f"validation_{term}"] = metrics[f"eval_{term}"]
        record["validation_layers"] = [asdict(layer) for layer in self._statistics(self.validation_routing)]
        self._write(record)
        return metrics


def count_targets(inputs: dict[str, Tensor]) -> int:
    """Labels of a batch that its language-model loss sums over: all but -100 and the first of each sequence."""
    tokens = pack_tokens(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("document_ids"))
    is_target = tokens.pack(inputs["labels"]) != -100
    is_target[tokens.sequences.cu_seqlens[:-1].to(is_target.device)] = False
    return int(is_target.sum())


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Nested numbers under names such as `layers/0/load/3`, for reporters that know scalars alone."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat.update({f"{key}/{inner}": number for inner, number in flatten(value).items()})
        elif value is not None:
            flat[key] = value
    return flat
