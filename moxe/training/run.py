"""From a resolved recipe to a finished run folder: data, model, training, evaluation, report."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging as transformers_logging

from moxe.data.baselines import text_baselines
from moxe.data.corpus import Corpus, prepare
from moxe.data.packing import PackedStream
from moxe.errors import Stopped, UserError
from moxe.evaluation.generation import generate_text
from moxe.evaluation.perplexity import evaluate_perplexity
from moxe.models.architectures import build_model
from moxe.observability.metrics import MetricsFile
from moxe.observability.plots import draw_run
from moxe.ops.backend import resolve_backend
from moxe.recipe import Recipe
from moxe.training.callbacks import ConsoleProgress
from moxe.training.checkpoint import METRICS, Checkpoint
from moxe.training.config import TrainingConfig
from moxe.training.console import run_console
from moxe.training.run_folder import RunFolder, write_json
from moxe.training.signals import StopSignals, stop_signals
from moxe.training.trainer import MoxETrainer, ValidationStopped


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and what evaluation.json holds (None in all processes but the first)."""

    path: Path
    evaluation: dict[str, Any] | None


# What a finished run writes beside its training: given the trained model, its data and settings, and a console.
Evaluate = Callable[[PreTrainedModel, Corpus, Recipe, Console], dict[str, Any]]


def train(recipe: Recipe, console: Console | None = None, evaluate: Evaluate | None = None) -> RunResult:
    """Train the model of `recipe` and write its run folder.

    A run of this name that was stopped goes on from its newest checkpoint, exactly; one that is finished is left alone.
    `recipe.model` is completed with the vocabulary and the special tokens of the tokenizer.

    Args:
        recipe: everything that decides the run.
        console: what it says where; None: a console on the standard output.
        evaluate: what is written to evaluation.json beside `training`; None: the held-out documents under the model
            and under baselines, and a sample of text, which are also printed.

    Raises:
        UserError: for data, a tokenizer, a backend or a run folder that cannot be used, a run of this name with other
            settings, a folder that cannot be written, and when the gradient stops being finite.
        Stopped: when SIGINT, SIGTERM or SIGHUP asked for the end; a step that was going on is finished and saved.
    """
    training = recipe.training
    _require_reporters(training)
    folder = RunFolder(recipe)
    if evaluation := folder.finished_evaluation(recipe):
        return _leave_alone(folder, evaluation, console or run_console())
    with stop_signals() as signals, process_settings(training):
        try:
            return _train_and_evaluate(recipe, folder, signals, console, evaluate)
        except (OSError, SafetensorError) as error:  # a full disk, most of all
            raise UserError(f"the run in {folder.path} failed: {error}; {folder.checkpoints.how_to_go_on()}") from error
        except Stopped as stopped:
            raise Stopped(stopped.signum, folder.checkpoints.how_to_go_on()) from None


def _leave_alone(folder: RunFolder, evaluation: dict[str, Any], console: Console) -> RunResult:
    _say(console, f"{folder.path} is finished and left as it is: --name NAME starts another run")
    return RunResult(folder.path, evaluation)


def _train_and_evaluate(
    recipe: Recipe, folder: RunFolder, signals: StopSignals, console: Console | None, evaluate: Evaluate | None
) -> RunResult:
    training = recipe.training
    arguments = training_arguments(recipe)
    # Before anything is written. A model of transformers has no backend; of ours it uses the cross-entropy alone.
    backend = resolve_backend(recipe.model.get("backend", "auto"), arguments.device.type)
    is_main = arguments.process_index == 0
    console = (console or run_console()) if is_main else Console(quiet=True)
    with arguments.main_process_first():
        corpus = prepare(recipe.data, seed=training.seed)
    if isinstance(corpus.train, PackedStream) and training.max_steps == -1:
        raise UserError(f"{recipe.data.source} is streamed without end: set training.max_steps or data.max_tokens")
    tokenizer = corpus.tokenizer
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = recipe.model_config(len(tokenizer), **special_tokens)
    recipe.model.update({name: getattr(config, name) for name in ("vocab_size", *special_tokens)})
    set_seed(training.seed)
    model = build_model(config)
    with folder.locked() if is_main else nullcontext():
        if evaluation := folder.finished_evaluation(recipe):  # by another process, while this one prepared
            return _leave_alone(folder, evaluation, console)
        with arguments.main_process_first():
            checkpoint = (
                folder.checkpoint_to_go_on_from(recipe, corpus.fingerprint, arguments.world_size, console)
                if is_main
                else folder.checkpoints.newest()[0]
            )
        if is_main:
            recipe.save(folder.recipe_path)
            _print_start(model, corpus, folder, checkpoint, console)
            for change in folder.write_versions(str(arguments.device), backend, goes_on=checkpoint is not None):
                _say(console, f"note: {change}; the weights will not be bit for bit those of a run without the change")
        metrics = MetricsFile(folder.metrics_path, checkpoint and checkpoint.path / METRICS) if is_main else None
        trainer = MoxETrainer(
            training=training,
            metrics=metrics,
            checkpoints=folder.checkpoints,
            signals=signals,
            say=partial(_say, console),
            data_fingerprint=corpus.fingerprint,
            model=model,
            args=arguments,
            train_dataset=corpus.train,
            eval_dataset=corpus.validation,
            data_collator=default_data_collator,
            processing_class=tokenizer,
        )
        _train(trainer, checkpoint, console)
        if not is_main:
            return RunResult(folder.path, None)

        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        folder.write_model(trained, tokenizer)
        plots = draw_run(folder.metrics_path, folder.plots_path, formats=["png"])
        evaluation = {
            "training": {
                "steps": trainer.state.global_step,
                "tokens": trainer.state.num_input_tokens_seen,
                "seconds": trainer.seconds(),
            },
            **(evaluate or _evaluate)(trained, corpus, recipe, console),
        }
        write_json(folder.evaluation_path, evaluation)
    if evaluate is None:
        _print_report(recipe.architecture.label, evaluation, folder, plots, console)
    return RunResult(folder.path, evaluation)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `training` section in the words of transformers."""
    training = recipe.training
    arguments = TrainingArguments(
        output_dir=str(recipe.run_dir),
        run_name=recipe.name,
        seed=training.seed,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        num_train_epochs=training.num_epochs,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training.eval_steps else "no",
        eval_steps=training.eval_steps or None,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 1,
        save_total_limit=training.save_total_limit,
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        use_cache=recipe.model["use_cache"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # Several GPUs are for torchrun, one process each; the Trainer would split every batch between threads.
        arguments._n_gpu = 1
    return arguments


def _train(trainer: MoxETrainer, checkpoint: Checkpoint | None, console: Console) -> None:
    """Takes the steps that are left.

    Raises:
        Stopped: after the step, or in the validation, in which a signal came; it has been saved.
    """
    trainer.remove_callback(PrinterCallback)
    progress = ConsoleProgress(console)
    trainer.add_callback(progress)
    total_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    try:
        with trainer.signals.deferred(), suppress(ValidationStopped):
            if checkpoint is None:
                trainer.train()
            elif checkpoint.step < total_steps:
                trainer.train(resume_from_checkpoint=str(checkpoint.path))
            else:
                # Trained to the end, but not evaluated: the Trainer would take one more step before it looks.
                trainer.finish_from(checkpoint.path)
    finally:
        progress.stop()


@contextmanager
def process_settings(training: TrainingConfig) -> Iterator[None]:
    """The recipe's settings of torch, and no bars beside our own; undone afterwards."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    had_bars = transformers_logging.is_progress_bar_enabled()
    try:
        torch.set_float32_matmul_precision(training.float32_matmul_precision)
        if training.num_threads is not None:
            torch.set_num_threads(training.num_threads)
        if training.deterministic and torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
            torch.use_deterministic_algorithms(True)
        transformers_logging.disable_progress_bar()
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _require_reporters(training: TrainingConfig) -> None:
    for reporter in training.report_to:
        if importlib.util.find_spec(reporter) is None:
            raise UserError(f"training.report_to={reporter} needs the package {reporter}: pip install {reporter}")


def _evaluate(model: PreTrainedModel, corpus: Corpus, recipe: Recipe, console: Console) -> dict[str, Any]:
    """The held-out documents under the model and under the baselines, and a sample of generated text.

    A recurrent model reads each document with its state carried; any other sees windows as long as it was trained on.
    The numbers of the two do not compare, so `context_length` stands beside them: null for a state that is carried.
    """
    training = recipe.training
    context_length = None if recipe.architecture.is_ours else recipe.data.sequence_length
    result = evaluate_perplexity(
        model,
        corpus.validation_texts,
        corpus.tokenizer,
        context_length=context_length,
        batch_size=training.batch_size,
        progress=console.is_terminal,
    )
    train_documents = None if isinstance(corpus.train, PackedStream) else corpus.train.documents
    baselines = text_baselines(train_documents, corpus.validation.documents, corpus.validation_texts)
    return {
        "validation": {**result.to_dict(), "context_length": context_length},
        "baselines": asdict(baselines),
        "sample": _sample(model, corpus, training),
        "corpus": asdict(corpus.statistics),
    }


def _sample(model: PreTrainedModel, corpus: Corpus, training: TrainingConfig) -> dict[str, str] | None:
    if not training.sample_tokens:
        return None
    prompt = training.sample_prompt or " ".join(corpus.validation_texts[0][:80].split()[:8])
    text = generate_text(
        model,
        corpus.tokenizer,
        prompt,
        max_new_tokens=training.sample_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=training.seed,
    )
    return {"prompt": prompt, "text": text}


def _print_start(
    model: PreTrainedModel, corpus: Corpus, folder: RunFolder, checkpoint: Checkpoint | None, console: Console
) -> None:
    statistics = corpus.statistics
    tokens = "a stream" if statistics.train_tokens is None else f"{statistics.train_tokens:,} tokens"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _say(
        console,
        f"{parameters:,} parameters; training on {tokens} of {statistics.source}, "
        f"{statistics.validation_documents:,} documents held out; writing {folder.path}",
    )
    if checkpoint is not None:
        _say(console, f"going on after step {checkpoint.step:,}")


def _print_report(
    label: str, evaluation: dict[str, Any], folder: RunFolder, plots: list[Path], console: Console
) -> None:
    training, validation = evaluation["training"], evaluation["validation"]
    minutes = training["seconds"] / 60
    _say(console, f"{training['steps']:,} steps on {training['tokens']:,} tokens; {minutes:.1f} minutes of training")
    length = validation["context_length"]
    table = Table(caption="whole documents, the state carried" if length is None else f"windows of {length:,} tokens")
    table.add_column(f"{validation['bytes']:,} bytes of held-out text")
    table.add_column("nats a token", justify="right")
    table.add_column("bits a byte", justify="right")
    table.add_row(label, f"{validation['loss']:.3f}", f"{validation['bits_per_byte']:.3f}", style="bold")
    for name, baseline in evaluation["baselines"].items():
        if baseline is not None:
            table.add_row(name, f"{baseline['nats_per_token']:.3f}", f"{baseline['bits_per_byte']:.3f}")
    console.print(table)
    sample = evaluation["sample"]
    if sample is not None:
        console.print("\n[bold]A sample[/bold]")
        console.print(Text(sample["prompt"], style="bold"), Text(sample["text"]), sep="")
    console.print()
    console.print(Text(str(folder.path), style="bold"), soft_wrap=True)
    files = {
        "model.safetensors": "the model, with config.json and tokenizer.json beside it: moxe generate, moxe eval",
        folder.recipe_path.name: "every setting of this run",
        folder.metrics_path.name: "every loss term, and the routing of every layer with a router",
        folder.evaluation_path.name: "the numbers above",
        "plots/": ", ".join(path.name for path in plots),
    }
    for name, content in files.items():
        _say(console, f"  {name:18} {content}")


def _say(console: Console, line: str) -> None:
    """A plain line: nothing in it is markup, and a file that it goes to gets it unbroken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
