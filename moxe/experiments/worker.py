"""One run of a grid, in a process of its own: train, then measure what the tables show.

The process comes from a server that has imported torch already and runs nothing else, so that a run starts at once and
its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

import moxe
from moxe.benchmarks.machine import peak_memory
from moxe.data.corpus import Corpus
from moxe.data.packing import PackedStream
from moxe.errors import Stopped, UserError
from moxe.evaluation.last_word import score_last_words, summarise_last_words
from moxe.evaluation.perplexity import score_windows, summarise_windows
from moxe.experiments.analysis import analyse_routing
from moxe.experiments.grid import ERROR, LOG, Run
from moxe.files import write_whole
from moxe.models.configuration_moxe import MoxEConfig
from moxe.ops.cpu.allocator import keep_freed_memory
from moxe.recipe import Recipe
from moxe.training.run import train

SCORES = "scores.npz"
ANALYSED_TOKENS = 20_000
_LAST_WORDS_AT_ONCE = 32


def work(run: Run, lambada: tuple[str, ...] | None) -> None:
    """Carry out a run, or go on with it; the process exits with 0, 1 for a failure that is told, or by its signal.

    The run's folder then holds what `moxe train` writes there, scores.npz (log-likelihoods of every validation window
    and every last word, for comparisons in pairs) and, after a failure, the reason.
    """
    _stop_with_the_grid()
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / ERROR).unlink(missing_ok=True)
    with (run.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:
        sys.stdout = sys.stderr = log
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.exit(_carry_out(run, lambada, Console(file=log, width=120)))


def _carry_out(run: Run, lambada: tuple[str, ...] | None, console: Console) -> int:
    def evaluate(model: PreTrainedModel, corpus: Corpus, recipe: Recipe, console: Console) -> dict[str, Any]:
        return _evaluate(run, model, corpus, lambada)

    moxe.register()
    keep_freed_memory()
    try:
        train(run.recipe, console, evaluate)
    except Stopped as stopped:
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        _note_failure(run.folder, str(error))
        return 1
    except Exception as error:
        console.print(traceback.format_exc(), markup=False, highlight=False)
        _note_failure(run.folder, f"{type(error).__name__}: {error}")
        return 1
    for checkpoint in run.folder.glob("checkpoint-*"):  # several times the size of the weights, and of no use now
        shutil.rmtree(checkpoint)
    return 0


def _note_failure(folder: Path, reason: str) -> None:
    write_whole(folder / ERROR, " ".join(reason.split())[:1000] + "\n")


def _stop_with_the_grid() -> None:
    """The grid says when a run stops: a terminal's Ctrl-C is not for us, and when the grid has died we stop too."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _evaluate(run: Run, model: PreTrainedModel, corpus: Corpus, lambada: tuple[str, ...] | None) -> dict[str, Any]:
    """What evaluation.json holds beside the training; every model reads the same windows."""
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else peak_memory()
    length, rows = run.recipe.data.sequence_length, run.recipe.training.batch_size
    windows = score_windows(model, corpus.validation_texts, corpus.tokenizer, context_length=length, batch_size=rows)
    words = None
    if lambada is not None:
        words = score_last_words(model, lambada, corpus.tokenizer, batch_size=_LAST_WORDS_AT_ONCE)
    np.savez_compressed(
        run.folder / SCORES,
        windows=np.array([score.log_likelihood for score in windows]),
        window_tokens=np.array([score.num_targets for score in windows]),
        last_words=np.array([score.log_likelihood for score in words or ()]),
    )
    return {
        "validation": summarise_windows(windows, corpus.validation_texts).to_dict(),
        "lambada": None if words is None else summarise_last_words(words).to_dict(),
        "peak_memory_bytes": peak,
        "threads": torch.get_num_threads(),
        "analysis": None if run.is_tuning else _analyse(model, corpus, length),
    }


def _analyse(model: PreTrainedModel, corpus: Corpus, length: int) -> dict[str, Any] | None:
    if not isinstance(model.config, MoxEConfig):
        return None
    counts = None
    if not isinstance(corpus.train, PackedStream):
        counts = dict(enumerate(np.bincount(corpus.train.documents.tokens).tolist()))
    try:
        analysis = analyse_routing(
            model,
            corpus.validation_texts,
            corpus.tokenizer,
            max_tokens=ANALYSED_TOKENS,
            context_length=length,
            token_counts=counts,
        )
    except UserError as error:  # too little held-out text, a model that has diverged: no reason to lose the run
        print(f"the routing is not analysed: {error}")
        return None
    return analysis.to_dict()
