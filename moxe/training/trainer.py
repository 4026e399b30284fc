"""MoxETrainer: transformers' Trainer with every loss term and the routing of every layer in its logs.

It trains every architecture of a recipe. Terms that a model does not have are left out, and a model without routers has
no layers to report.

Legend: B rows of a batch, S tokens a row.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from moxe.data.packing import PackedStream
from moxe.errors import UserError
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.models.packed import pack_tokens
from moxe.observability.metrics import MetricsFile, RoutingStatistics
from moxe.observability.routing import RoutingMeter
from moxe.observability.routing_watch import RoutingWatch
from moxe.training.callbacks import LastStep, Throughput
from moxe.training.checkpoint import METRICS, PROGRESS, RECIPE, TRAINER_STATE, WEIGHTS, Checkpoints, read_json
from moxe.training.config import TrainingConfig
from moxe.training.diagnosis import diagnose
from moxe.training.gradients import gradient_norms, part_norms, total_norm
from moxe.training.guard import UpdateGuard
from moxe.training.optimizer import decayed_parameter_names, learning_rate_schedule
from moxe.training.signals import StopSignals
from moxe.training.tokens import require_known_tokens


class LossMeter:
    """Adds up the terms of the loss, by their names in the output, over forward passes."""

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = tuple(terms)
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(self.terms), dtype=torch.float64)  # on the CPU

    def add(self, outputs: Any, *, loss_weight: float, router_weight: float) -> Tensor:
        """What was added; `loss_weight` is that of the whole loss and of the language-model loss."""
        values = torch.stack([getattr(outputs, term).detach() for term in self.terms]).cpu().double()
        weights = [loss_weight if term in ("loss", "lm_loss") else router_weight for term in self.terms]
        added = values * torch.tensor(weights, dtype=torch.float64)
        self.sums += added
        return added


class ValidationStopped(Exception):
    """A signal has asked for the end in the middle of a validation."""


class MoxETrainer(Trainer):
    """Trains a MoxE, or a model that is compared with it (`moxe.models.architectures`).

    The gradient of one optimiser step is that of the whole batch, however many micro-batches it comes in: the
    language-model loss is the sum over target tokens divided by the number of targets of the whole step, exactly. The
    router losses are nonlinear in the tokens (products of means over them); they are computed for each micro-batch and
    averaged with the micro-batches' shares of the targets.

    A run that is resumed from a checkpoint goes on exactly as if it had never stopped: weights, optimiser, schedule,
    random numbers, place in the data, and the sums behind the next line of metrics.jsonl.
    """

    def __init__(
        self,
        *,
        model: Any,
        training: TrainingConfig,
        metrics: MetricsFile | None = None,
        checkpoints: Checkpoints | None = None,
        signals: StopSignals | None = None,
        say: Callable[[str], None] | None = None,
        data_fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        """As Trainer, with what a run brings.

        Args:
            model: a model of one of the architectures; `loss_terms` names what its output holds.
            training: the recipe's section.
            metrics: the file to write metrics to; None in all processes but the first.
            checkpoints: where to save; None: nowhere.
            signals: looked at after each step and each batch of a validation.
            say: prints a sentence.
            data_fingerprint: of the training data, for its checkpoints.
        """
        super().__init__(model=model, **kwargs)
        self.training = training
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.signals = signals or StopSignals()
        self._saved_step: int | None = None
        self._seconds_before, self._start = 0.0, time.perf_counter()
        self._steps_an_epoch = 0
        self._validation_is_due = False
        self.data_fingerprint = data_fingerprint
        self.say = say or (lambda sentence: None)
        self.guard, self.routing_watch = UpdateGuard(training), RoutingWatch(model.config.to_dict())
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients
        self.loss_terms: tuple[str, ...] = model.loss_terms
        self._begin_step()
        self.moves_balancing_bias = getattr(model.config, "load_balancing", None) == "bias"
        num_experts = getattr(model.config, "num_experts", 0)
        self.interval_losses, self.interval_routing = LossMeter(self.loss_terms), RoutingMeter(num_experts)
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

    def _begin_step(self) -> None:
        self.step_batches: list[dict[str, Tensor]] = []
        self.step_losses = torch.zeros(len(self.loss_terms), dtype=torch.float64)  # on the CPU
        self.step_assignments: list[Tensor] = []  # [L, E] of each forward pass, on the CPU

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(self.model, PreTrainedModel)
        name = f"the batch of step {self.state.global_step + 1}" if self.model.training else "a batch of the validation"
        require_known_tokens(inputs, self.model.config.vocab_size, name)
        return super()._prepare_inputs(inputs)

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
            self.step_losses += self.interval_losses.add(outputs, loss_weight=1.0, router_weight=share)
            self.step_batches.append(inputs)
            if outputs.routing:
                self.interval_routing.add(outputs.routing, inputs.get("attention_mask"))
            if self.moves_balancing_bias:
                self.step_assignments.append(torch.stack([layer.assignments() for layer in outputs.routing]).cpu())
        return (loss, outputs) if return_outputs else loss

    # Update

    def _clip_grad_norm(self, model: nn.Module) -> float:
        """Judge the step, then clip its gradient, or take it away so that the optimiser changes nothing.

        The experts' balancing biases move with it: by the routing of the whole step, and not if it is not made.

        Returns:
            The norm before clipping.
        """
        assert isinstance(self.model, PreTrainedModel)
        self.norms = gradient_norms(self.model)
        norm = total_norm(self.norms)
        if not self._may_update(norm.item()):
            self.model.zero_grad(set_to_none=True)
        else:
            if self.moves_balancing_bias:
                assert isinstance(self.model, MoxEForCausalLM)
                self.model.update_balancing_bias(self._reduce(torch.stack(self.step_assignments).sum(0)))
            if self.args.max_grad_norm > 0:
                clip_grads_with_norm_(self.model.parameters(), self.args.max_grad_norm, norm)
        self._begin_step()
        return norm.item()

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        """The norm before clipping, also where nothing is clipped."""
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _may_update(self, norm: float) -> bool:
        """Whether the step that is about to be made is made; says why not.

        Raises:
            UserError: if the run is to stop.
        """
        assert isinstance(self.model, PreTrainedModel)
        step = self.state.global_step + 1
        losses: dict[str, float] = dict(zip(self.loss_terms, self._reduce(self.step_losses).tolist(), strict=True))
        verdict = self.guard.judge(losses, norm)
        if verdict.cause == "nonfinite":
            diagnosis = diagnose(self.model, self.step_batches, losses)
            if verdict.action == "stop" or diagnosis.is_in_weights:
                means = self._interval_losses(self.throughput.steps + 1)
                self._write({"step": step, "tokens": self.state.num_input_tokens_seen, **means, "gradient_norm": norm})
                try_skip = self.training.on_nonfinite == "stop" and not diagnosis.is_in_weights
                raise UserError(
                    f"training stopped before the update of step {step}: {diagnosis.finding} ({verdict.reason}); try "
                    + ("training.on_nonfinite skip, or " if try_skip else "")
                    + f"another --name with a training.learning_rate below {self.training.learning_rate:g}"
                )
            self.say(f"step {step} skipped: {diagnosis.finding} ({verdict.reason})")
        elif verdict.cause == "spike":
            accepted = "" if verdict.action == "skip" else ", as did the skipped steps before it: the new level"
            self.say(f"step {step} {'made' if accepted else 'skipped'}: {verdict.reason}{accepted}")
        return verdict.action == "update"

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
        self.state.log_history.clear()  # metrics.jsonl is the history; each trainer_state.json would hold it again

    def _log_training(self, logs: dict[str, float]) -> None:
        step, tokens = self.state.global_step, self.state.num_input_tokens_seen
        layers = self._statistics(self.interval_routing)
        record = {
            "step": step,
            "epoch": self.state.epoch,
            "tokens": tokens,
            "learning_rate": logs["learning_rate"],
            **self._interval_losses(self.throughput.steps),
            "gradient_norm": logs["grad_norm"],
            "gradient_norms": part_norms(self.norms),
            "skipped_steps": self.guard.skipped_steps,
            "tokens_per_second": self.throughput.take(tokens),
            "layers": [asdict(layer) for layer in layers],
        }
        self.interval_losses.reset()
        self.interval_routing.reset()
        self._report(record)
        for sentence in self.routing_watch.read(step, layers):
            self.say(f"step {step}: {sentence}")

    def _interval_losses(self, steps: int) -> dict[str, float]:
        """Each term of the loss, averaged over the `steps` since the last line."""
        means = self._reduce(self.interval_losses.sums) / steps
        return dict(zip(self.loss_terms, means.tolist(), strict=True))

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
        losses = LossMeter(self.loss_terms)
        self.validation_routing.reset()
        num_targets = num_rows = 0
        for inputs in dataloader:
            if self._is_stop_asked_for():
                raise ValidationStopped
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs, output_router_logits=True, logits_to_keep=1)
            count = count_targets(inputs)
            losses.add(outputs, loss_weight=count, router_weight=count)
            if outputs.routing:
                self.validation_routing.add(outputs.routing, inputs.get("attention_mask"))
            num_targets += count
            num_rows += len(inputs["input_ids"])
        total = int(self._reduce(torch.tensor(num_targets)))
        means = (self._reduce(losses.sums) / total).tolist()
        metrics = {f"{metric_key_prefix}_{term}": mean for term, mean in zip(self.loss_terms, means, strict=True)}
        metrics[f"{metric_key_prefix}_tokens"] = total
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate; also a validation line in metrics.jsonl. Random numbers are as before afterwards."""
        gpus = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            metrics = super().evaluate(*args, **kwargs)
        record: dict[str, Any] = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "tokens": self.state.num_input_tokens_seen,
        }
        for term in (*self.loss_terms, "tokens"):
            if f"eval_{term}" in metrics:
                record[f"validation_{term}"] = metrics[f"eval_{term}"]
        record["validation_layers"] = [asdict(layer) for layer in self._statistics(self.validation_routing)]
        self._write(record)
        self._note_lowest_loss(metrics.get("eval_lm_loss", math.inf))
        return metrics

    def _note_lowest_loss(self, loss: float) -> None:
        lowest = math.inf if self.state.best_metric is None else self.state.best_metric
        if loss < lowest:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.control.should_save = self.control.should_save or self.training.save_best

    # Stopping

    def _is_stop_asked_for(self) -> bool:
        """Whether a signal has reached any process; all processes find out, and stop, at the same place."""
        if self.accelerator.num_processes > 1:
            received = self.accelerator.gather(torch.tensor([self.signals.received or 0], device=self.args.device))
            assert isinstance(received, Tensor)
            self.signals.received = int(received.max()) or None
        return self.signals.received is not None

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kwargs: Any):
        """As the Trainer's; when a signal has asked for it, save and stop."""
        if self._is_stop_asked_for():
            self.control.should_save = self.control.should_training_stop = True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except ValidationStopped:
            self._validation_is_due = True
            self._save_checkpoint(model, None)
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint of this step, then remove the ones that are no longer to be kept.

        Raises:
            UserError: if it cannot be written, with the place and the reason; earlier checkpoints are untouched.
        """
        step = self.state.global_step
        if self.checkpoints is None or step == self._saved_step:
            return
        is_main, folder = self.args.should_save, self.checkpoints.unfinished(step)
        try:
            if is_main:
                self.checkpoints.discard_unfinished(step)
                folder.mkdir()
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            if is_main:
                self.checkpoints.finish(step)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_of_writing(error):
                raise
            if is_main:
                self.checkpoints.discard_unfinished(step)
            raise UserError(self._why_not_saved(step, error)) from error
        self.accelerator.wait_for_everyone()
        self._saved_step = step
        if is_main:
            self._prune()

    def _prune(self) -> None:
        assert self.checkpoints is not None
        try:
            best_step = self.state.best_global_step if self.training.save_best else None
            self.checkpoints.prune(self.training.save_total_limit, best_step)
        except OSError as error:
            self.say(f"warning: an old checkpoint cannot be removed: {error}")

    def _why_not_saved(self, step: int, error: Exception) -> str:
        assert self.checkpoints is not None
        reason = str(error) if isinstance(error, OSError | SafetensorError) else "no more can be written"
        how_to_go_on = self.checkpoints.how_to_go_on()
        return f"the checkpoint of step {step} cannot be written to {self.checkpoints.run}: {reason}; {how_to_go_on}"

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of a Python object, which nobody reads
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        progress = self._progress()
        if not self.args.should_save:
            return
        assert self.metrics is not None
        progress["data"] = {"fingerprint": self.data_fingerprint, **self._place_in_data()}
        self.state.save_to_json(str(folder / TRAINER_STATE))
        (folder / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        self.metrics.copy_to(folder / METRICS)
        (folder / RECIPE).write_bytes((folder.parent / RECIPE).read_bytes())

    def _progress(self) -> dict[str, Any]:
        """What the Trainer's own state leaves out, over all processes; every float comes back from JSON as it was."""
        routing = self.interval_routing.sums
        return {
            "processes": self.args.world_size,
            "seconds": self.seconds(),
            "validation_is_due": self._validation_is_due,
            "guard": self.guard.state_dict(),
            "routing_watch": self.routing_watch.state_dict(),
            "interval": self.throughput.state_dict(),
            "interval_losses": self._reduce(self.interval_losses.sums).tolist(),
            "interval_routing": None if routing is None else self._reduce(routing).tolist(),
        }

    def seconds(self) -> float:
        """Of training, validation and saving, those before a stop included; not the steps that a kill undid."""
        return self._seconds_before + time.perf_counter() - self._start

    def _place_in_data(self) -> dict[str, Any]:
        """Where the next row is: the Trainer finds it again by the number of steps, a stream by its own place."""
        rows_a_step = self.get_total_train_batch_size(self.args)
        step = self.state.global_step
        if isinstance(self.train_dataset, PackedStream):
            return self.train_dataset.state_at(step * rows_a_step)
        epoch, step_in_epoch = divmod(step, self._steps_an_epoch)
        return {"epoch": epoch, "rows": step_in_epoch * rows_a_step}

    def _load_progress(self, checkpoint: Path) -> None:
        progress = read_json(checkpoint / PROGRESS)
        if isinstance(self.train_dataset, PackedStream):
            place = {key: value for key, value in progress["data"].items() if key != "fingerprint"}
            self.train_dataset.resume(place)
        self._seconds_before, self._start = progress["seconds"], time.perf_counter()
        self._validation_is_due = progress["validation_is_due"]
        self.guard.load_state_dict(progress["guard"])
        self.routing_watch.load_state_dict(progress["routing_watch"])
        self.throughput.load_state_dict(progress["interval"])
        if self.args.process_index == 0:  # the sums of all processes are added up again for the next line
            self.interval_losses.sums = torch.tensor(progress["interval_losses"], dtype=torch.float64)
            routing = progress["interval_routing"]
            self.interval_routing.sums = None if routing is None else torch.tensor(routing, dtype=torch.float64)

    def finish_from(self, checkpoint: Path) -> None:
        """Take over a checkpoint of the last step: its weights and numbers, and a validation that was cut off."""
        self._load_from_checkpoint(str(checkpoint))
        with readable(checkpoint):
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
            self._load_progress(checkpoint)
        if self._validation_is_due:
            self.evaluate()

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        self._steps_an_epoch = num_update_steps_per_epoch
        resume_from_checkpoint = args[1]
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the intervals of this command, not of the one before
        if resume_from_checkpoint is not None:
            with readable(resume_from_checkpoint):
                self._load_progress(Path(resume_from_checkpoint))
        self.args.eval_on_start, self._validation_is_due = self._validation_is_due, False
        return trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Every weight and no other, from safetensors alone."""
        loaded = model or self.model
        assert loaded is not None
        with readable(resume_from_checkpoint):
            load_model(loaded, Path(resume_from_checkpoint) / WEIGHTS, strict=True)
            TrainerState.load_from_json(
                str(Path(resume_from_checkpoint) / TRAINER_STATE)
            )  # which the Trainer reads next

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


def _is_of_writing(error: RuntimeError) -> bool:
    """torch.save has no exception of its own for a disk that takes no more."""
    return any(words in str(error) for words in ("PytorchStreamWriter", "iostream error", "inline_container"))


@contextmanager
def readable(checkpoint: str | Path | None) -> Iterator[None]:
    """Says in one sentence what is wrong with a checkpoint whose files are whole, but not what moxe writes."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except UnpicklingError:
        raise UserError(
            f"{checkpoint} is refused: its optimizer.pt, scheduler.pt or rng_state.pth holds more than tensors and "
            "numbers, and code in a checkpoint is never run"
        ) from None
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        EOFError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint} cannot be resumed from: {type(error).__name__}: {reason}") from error


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
