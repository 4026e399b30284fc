"""What happens around the steps: speed, the end of the run, and what a person sees."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Throughput(TrainerCallback):
    """Time spent on training steps alone: neither validation nor saving counts."""

    def __init__(self) -> None:
        self.steps = 0
        self._seconds = 0.0
        self._tokens = 0
        self._mark = time.perf_counter()

    def take(self, tokens: int) -> float:
        """Tokens a second since the last call, given the number of tokens seen so far; starts a new interval."""
        speed = (tokens - self._tokens) / self._seconds
        self.steps, self._seconds, self._tokens = 0, 0.0, tokens
        return speed

    def state_dict(self) -> dict[str, Any]:
        """The interval so far, as JSON knows it."""
        return {"steps": self.steps, "seconds": self._seconds, "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an interval."""
        self.steps, self._seconds, self._tokens = state["steps"], state["seconds"], state["tokens"]

    def _restart(self) -> None:
        self._mark = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._restart()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.steps += 1
        self._seconds += time.perf_counter() - self._mark
        self._restart()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._restart()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._restart()


class LastStep(TrainerCallback):
    """Logs, validates and saves at the last step, whatever the intervals are."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = True
            control.should_save = True


class ConsoleProgress(TrainerCallback):
    """A progress bar on a terminal; otherwise a line for each log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("/"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_lm_loss" in logs:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  validation: cross-entropy {logs['eval_lm_loss']:.4f} "
                f"nats a token (loss {logs['eval_loss']:.4f})",
                soft_wrap=True,
            )
        elif "lm_loss" in logs:
            numbers = (
                f"cross-entropy {logs['lm_loss']:.4f}  loss {logs['loss']:.4f}  "
                f"gradient norm {logs['gradient_norm']:.2f}  {logs['tokens_per_second']:,.0f} tokens/s"
            )
            if self.progress is not None:
                self.progress.update(self.task, numbers=numbers)
            else:
                self.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}", soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away; also after a failure."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.stop()
