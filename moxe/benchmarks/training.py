"""How fast is a training step beside other models of equal size, and how much memory does it take?

Legend: B rows, S tokens a row.

A step: forward, backward, AdamW, on random tokens; float32 weights. Two settings, each in a process of its own because
the allocator belongs to a process: `plain` is float32 and torch's own settings; `best` gives every side the tuned
allocator and the fastest of the settings that it supports.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moxe.benchmarks import peers
from moxe.benchmarks.checks import check_model
from moxe.benchmarks.machine import arithmetic, tune_allocator
from moxe.benchmarks.peers import LABELS, OURS, Setting, Trainee
from moxe.benchmarks.report import CheckFailed, Figure, Report, number, spread
from moxe.benchmarks.timing import Samples, time_in_turn
from moxe.models.configuration_moxe import MoxEConfig

SETTINGS = ("plain", "best")
TITLE = "Training step: forward, backward, AdamW"
COLUMNS = ["setting", "B x S", "model", "ran in", "M parameters", "tokens/s (range)", "MoxE's speed / its", "peak MB"]
_SECONDS_TO_COMPILE = 60


@dataclass(frozen=True)
class Comparison:
    """Sides that train on the same shape of batch."""

    rows: int
    length: int
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        model: settings of our configuration; the peers are sized after it.
        comparisons: the shapes, and who runs them.
        seconds_a_side: a slower side gets fewer repeats.
        memory_of: sides whose peak memory is measured, each in a fresh process.
    """

    model: dict[str, Any]
    comparisons: tuple[Comparison, ...]
    seconds_a_side: float = 60.0
    memory_of: tuple[str, ...] = tuple(LABELS)

    @property
    def config(self) -> MoxEConfig:
        return MoxEConfig(**self.model)


FULL = Sizes(
    model={"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4},
    comparisons=(Comparison(8, 256, tuple(LABELS)), Comparison(1, 2048, (OURS, "qwen"))),
)
QUICK = Sizes(
    model={"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2},
    comparisons=(Comparison(2, 64, tuple(LABELS)), Comparison(1, 128, (OURS, "qwen"))),
    seconds_a_side=2.0,
    memory_of=(),
)


def measure(sizes: Sizes, *, repeats: int, setting: str, compile_peers: bool = False) -> Report:
    """Times all sides in one setting, `plain` or `best`; `compile_peers` lets some of them try torch.compile."""
    report = Report("training", TITLE, COLUMNS, check=check_model())
    if setting == "best":
        report.notes.append(
            "best: memory of freed blocks is kept (tuned allocator)"
            if tune_allocator()
            else "best: the allocator could not be tuned on this system"
        )
    for comparison in sizes.comparisons:
        shape = f"{comparison.rows} x {comparison.length}"
        present = [side for side in comparison.sides if peers.is_available(side)]
        chosen = {
            side: _fastest_setting(side, sizes, comparison, compile_peers, report)
            if setting == "best"
            else peers.plain_setting(side)
            for side in present
        }
        samples, parameters = _time(sizes, comparison, chosen, repeats)
        report.notes.append(f"{shape}: {_parameter_note(parameters)}")
        gc.collect()
        for side in comparison.sides:
            if side not in samples:
                report.add_row(setting, shape, LABELS[side], peers.NOT_MEASURED, "", "", "", "")
                continue
            memory = None
            if side in sizes.memory_of:
                job = _memory_job(side, sizes, comparison, chosen[side])
                memory = run_memory_process({**job, "tuned": setting == "best"})
            _add_side(report, comparison, setting, side, chosen[side], samples, parameters[side], memory)
    return report


def training_step(trainee: Trainee, setting: Setting, rows: int, length: int, vocab_size: int) -> Callable[[], float]:
    """A step on one batch of random tokens; gives the loss."""
    optimizer = torch.optim.AdamW(trainee.model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        with arithmetic(setting.precision):
            loss = trainee.loss(ids)
        # Autocast is for the forward pass; what is allowed to float32 products holds for the backward pass too.
        with arithmetic("fp32 medium" if setting.precision == "fp32 medium" else "fp32"):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _time(
    sizes: Sizes, comparison: Comparison, chosen: dict[str, Setting], repeats: int
) -> tuple[dict[str, Samples], dict[str, int]]:
    config = sizes.config
    steps, parameters = {}, {}
    for side, setting in chosen.items():
        trainee = peers.build(side, config, comparison.length, setting)
        parameters[side] = peers.non_embedding_parameters(trainee.model)
        steps[side] = training_step(trainee, setting, comparison.rows, comparison.length, config.vocab_size)
        _check_first_loss(side, steps[side](), config.vocab_size)
    _check_parameters(parameters)
    return time_in_turn(steps, repeats=repeats, seconds_a_side=sizes.seconds_a_side), parameters


def _check_first_loss(side: str, loss: float, vocab_size: int) -> None:
    """A fresh model knows nothing: about log V."""
    if not abs(loss - math.log(vocab_size)) < 0.2 * math.log(vocab_size):
        raise CheckFailed(f"{LABELS[side]} starts with a loss of {loss:.2f} instead of about log V")


def _check_parameters(parameters: dict[str, int]) -> None:
    if max(parameters.values()) > (1 + peers.PARAMETER_TOLERANCE) * min(parameters.values()):
        raise CheckFailed(f"the models are not of one size: {parameters}")


def _parameter_note(parameters: dict[str, int]) -> str:
    apart = max(parameters.values()) / min(parameters.values()) - 1
    return f"parameters are all but token embedding and head, {apart:.1%} apart"


def _add_side(
    report: Report,
    comparison: Comparison,
    setting: str,
    side: str,
    ran_in: Setting,
    samples: dict[str, Samples],
    parameters: int,
    memory: int | None,
) -> None:
    shape = f"{comparison.rows} x {comparison.length}"
    tokens = comparison.rows * comparison.length
    speeds = {name: tokens / own.median for name, own in samples.items()}
    ratio = "" if side == OURS else f"{speeds[OURS] / speeds[side]:.2f}"
    report.add_row(
        setting,
        shape,
        LABELS[side],
        ran_in.name,
        f"{parameters / 1e6:.2f}",
        spread([tokens / second for second in samples[side].seconds]),
        ratio,
        "" if memory is None else number(memory / 1e6),
    )
    about = {"setting": setting, "rows": comparison.rows, "length": comparison.length, "ran_in": ran_in.name}
    report.add_timing(
        LABELS[side],
        samples[side],
        **about,
        non_embedding_parameters=parameters,
        tokens_per_second=speeds[side],
        ours_over_this=speeds[OURS] / speeds[side],
    )
    if memory is not None:
        report.figures.append(Figure(LABELS[side], "peak memory bytes", (float(memory),), about))


def _fastest_setting(side: str, sizes: Sizes, comparison: Comparison, compile_peers: bool, report: Report) -> Setting:
    """The setting with the shortest median of a few steps; all of them are kept as figures."""
    medians: dict[Setting, float] = {}
    for setting in peers.best_settings(side, compiled=compile_peers):
        try:
            if setting.compiled:  # in a process that can be ended; what it compiled is found again here
                run_memory_process(_memory_job(side, sizes, comparison, setting), _SECONDS_TO_COMPILE)
            trainee = peers.build(side, sizes.config, comparison.length, setting)
            step = training_step(trainee, setting, comparison.rows, comparison.length, sizes.config.vocab_size)
            samples = time_in_turn({side: step}, repeats=3, seconds_a_side=sizes.seconds_a_side)[side]
        except Exception as error:  # a peer that cannot run so is not a mistake of ours: say it and go on
            if side == OURS:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report.notes.append(f"{LABELS[side]} does not run in {setting.name}: {reason[:120]}")
            continue
        medians[setting] = samples.median
        report.add_timing(
            LABELS[side],
            samples,
            setting="trial",
            rows=comparison.rows,
            length=comparison.length,
            ran_in=setting.name,
        )
    if not medians:
        raise CheckFailed(f"{LABELS[side]} runs in none of its settings")
    return min(medians, key=lambda setting: medians[setting])


def _memory_job(side: str, sizes: Sizes, comparison: Comparison, ran_in: Setting) -> dict[str, Any]:
    return {
        "side": side,
        "model": sizes.model,
        "rows": comparison.rows,
        "length": comparison.length,
        "setting": asdict(ran_in),
        "tuned": False,
        "threads": torch.get_num_threads(),
    }


def run_memory_process(job: dict[str, Any], seconds: int | None = None) -> int:
    """Bytes that `moxe.benchmarks.peak_memory` prints for a job.

    Raises:
        CheckFailed: when that process fails, or takes longer than `seconds`; it and all it started are then ended.
    """
    what = f"the memory of {LABELS[job['side']]} could not be measured"
    # Files, not pipes: a compiler's helpers that outlive the process would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "moxe.benchmarks.peak_memory", json.dumps(job)]
        process = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{what}: it took longer than {seconds} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        errors.seek(0)
        if code:
            raise CheckFailed(f"{what}: {(errors.read().strip().splitlines() or [f'exit code {code}'])[-1]}")
        return int(out.read().split()[-1])
