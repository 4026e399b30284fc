"""What the runs of a grid found, as one plain dictionary: results.json before its statistics.

A run's numbers are those of its own files, so results can be put together again from a folder of runs at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moxe import __version__
from moxe.experiments.grid import VERSIONS, Grid, Run
from moxe.experiments.results_file import FORMAT
from moxe.experiments.tables import REFERENCE, Row, rows_of
from moxe.models.accounting import count_parameters, flops_per_token
from moxe.observability.metrics import read_metrics
from moxe.training.checkpoint import METRICS
from moxe.training.run_folder import read_json_object

# The rows whose load of every expert over training the report draws (Figure 8).
_DRAWN_LOAD = (REFERENCE, "no-group-loss")
_TERMS = ("lm_loss", "z_loss", "load_balancing_loss", "group_loss", "difficulty_loss")
_VERSIONS = ("cpu", "device", "threads", "torch", "transformers", "moxe")


def collect(
    grid: Grid,
    rows: Sequence[Row],
    *,
    command: str,
    guessing: Mapping[str, Any],
    speed: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that is known of `rows`; a run that is not there is `missing`, one that failed says why."""
    collected = [_row(grid, row, speed.get(row.name)) for row in rows]
    recipe = grid.example_of(rows[0]).recipe
    return {
        "format": FORMAT,
        "moxe": __version__,
        "command": command,
        "scale": grid.scale.name,
        "seeds": list(range(grid.seeds)),
        "data": {
            "source": _shown_source(recipe.data.source),
            "validation": _shown_source(recipe.data.validation_source),
            "lambada": None
            if grid.data.lambada is None
            else {"source": grid.data.lambada_source, "examples": len(grid.data.lambada)},
            "tokens_a_run": max((run.get("tokens", 0) for row in collected for run in row["runs"]), default=0),
            "sequence_length": recipe.data.sequence_length,
            "vocab_size": grid.data.vocab_size,
        },
        "machine": _machine([run for row in rows for run in _runs(grid, row)]),
        "guessing": dict(guessing),
        "rows": collected,
    }


def _runs(grid: Grid, row: Row) -> list[Run]:
    rate = grid.learning_rate(row.tuned_as)
    return [] if rate is None else grid.seed_runs(row, rate)


def _row(grid: Grid, row: Row, speed: Mapping[str, Any] | None) -> dict[str, Any]:
    runs = _runs(grid, row)
    return {
        "name": row.name,
        "label": row.label,
        "section": row.section,
        "tables": [table for table in ("table1", "table2") if row in rows_of(table)],
        "is_reference": row.name == REFERENCE,
        "note": row.note,
        "settings": {f"model.{key}": value for key, value in row.settings.items()},
        "paper": {
            "parameters": row.parameters,
            "lambada_perplexity": row.lambada_perplexity,
            "change_percent": row.change_percent,
        },
        **_costs(grid, row),
        "learning_rate": grid.learning_rate(row.tuned_as),
        "tuning": [
            {"learning_rate": run.recipe.training.learning_rate, "validation_loss": evaluation["validation"]["loss"]}
            for run in grid.tuning_runs(row.tuned_as)
            if (evaluation := run.evaluation) is not None
        ],
        "speed": None if speed is None else dict(speed),
        "runs": [_run(run, with_load=row.name in _DRAWN_LOAD) for run in runs],
    }


def _costs(grid: Grid, row: Row) -> dict[str, int]:
    recipe = grid.example_of(row).recipe
    config = recipe.model_config(grid.data.vocab_size)
    parameters = count_parameters(config)
    return {
        "parameters": parameters.total_parameters,
        "active_parameters": parameters.active_parameters,
        # A token sees half of its row on average.
        "flops_per_token": flops_per_token(config, (recipe.data.sequence_length + 1) // 2).flops_per_token,
    }


def _run(run: Run, *, with_load: bool) -> dict[str, Any]:
    evaluation = run.evaluation
    if evaluation is None:
        status = "missing" if run.error is None else "failed"
        return {"seed": run.seed, "run": run.folder.name, "status": status, "error": run.error}
    training, validation = evaluation["training"], evaluation["validation"]
    words = evaluation["lambada"] or {}
    return {
        "seed": run.seed,
        "run": run.folder.name,
        "status": "done",
        "error": None,
        "validation_loss": validation["loss"],
        "bits_per_byte": validation["bits_per_byte"],
        "lambada_perplexity": words.get("last_word_perplexity"),
        "lambada_accuracy": words.get("last_word_accuracy"),
        "lambada_token_perplexity": words.get("last_token_perplexity"),
        "tokens": training["tokens"],
        "seconds": training["seconds"],
        "tokens_per_second": training["tokens"] / training["seconds"],
        "peak_memory_bytes": evaluation["peak_memory_bytes"],
        "curves": _curves(read_metrics(run.folder / METRICS), with_load=with_load),
        "analysis": evaluation["analysis"],
    }


def _curves(lines: Sequence[Mapping[str, Any]], *, with_load: bool) -> dict[str, Any]:
    training = [line for line in lines if "validation_lm_loss" not in line]
    validation = [line for line in lines if "validation_lm_loss" in line]
    terms = [term for term in _TERMS if training and term in training[0]]
    curves: dict[str, Any] = {
        "training": {"tokens": [line["tokens"] for line in training]}
        | {term: [line[term] for line in training] for term in terms},
        "validation": {
            "tokens": [line["tokens"] for line in validation],
            "lm_loss": [line["validation_lm_loss"] for line in validation],
        },
    }
    if with_load:
        curves["load"] = [[layer["load"] for layer in line["layers"]] for line in training]
    return curves


def _machine(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs were made with, and on what; several values where they differ."""
    versions = [found for run in runs if (found := read_json_object(run.folder / VERSIONS)) is not None]
    seen = {name: sorted({str(found.get(name)) for found in versions}) for name in _VERSIONS}
    return {name: ", ".join(values) for name, values in seen.items()}


def _shown_source(source: str | None) -> str | None:
    """A file by its name alone: where it lies on this machine means nothing to a reader."""
    return Path(source).name if source is not None and Path(source).expanduser().exists() else source
