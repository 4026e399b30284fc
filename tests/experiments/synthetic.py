"""Results of an imagined grid: random numbers that never change, with effects that were put there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TOKENS = 100_000
LAYERS, EXPERTS, LINES = 2, 4, 8
GAMMA = 0.7

# Effect of a row on the validation loss, in nats; LAMBADA's log perplexity moves ten times as much.
EFFECTS = {
    "moxe": 0.0,
    "xlstm": 0.0005,
    "gemma2": 0.3,
    "qwen-moe": 0.2,
    "standard": 0.25,
    "no-group-loss": 0.001,
    "feed-forward": -0.2,
    "noisy": 0.05,
    "gamma-0": 0.03,
    "gamma-2": 0.04,
}
PAPER = {
    "moxe": (340e6, 65213.61, None),
    "xlstm": (338e6, None, None),
    "gemma2": (356e6, None, None),
    "qwen-moe": (350e6, None, None),
    "standard": (None, 348908.14, 435),
    "no-group-loss": (None, 213974.42, 228),
    "feed-forward": (None, 1412846.01, 2066),
    "noisy": (None, 85963.85, 31.8),
}
SPEEDS = {"moxe": 2000.0, "xlstm": 3500.0, "gemma2": 1000.0, "qwen-moe": 1500.0}


def make_results(*, seeds: int = 5, spread: float = 0.002, slope: float = 4.0) -> dict[str, Any]:
    """A whole grid as the runner leaves it: all that `add_statistics` fills in is absent.

    Args:
        seeds: runs a row.
        spread: sd of what differs between the rows of a seed; "noisy" has fifty times it.
        slope: planted slope of the log odds on difficulty, in every layer.
    """
    generator = np.random.default_rng(1)
    of_seed = generator.normal(0, 0.1, seeds)  # shared by all rows: what pairing takes out
    return {
        "format": 1,
        "moxe": "0.0",
        "scale": "small",
        "seeds": list(range(seeds)),
        "command": "moxe experiments --scale small",
        "data": {
            "source": "text.txt",
            "validation": None,
            "lambada": {"source": "lambada.jsonl", "examples": 500},
            "tokens_a_run": TOKENS,
            "sequence_length": 256,
            "vocab_size": 4096,
        },
        "machine": {"cpu": "a CPU", "device": "cpu", "threads": 2, "torch": "2"},
        "guessing": {
            "uniform": {"nats_per_token": math.log(4096), "bits_per_byte": 3.1},
            "unigram": {"nats_per_token": 6.9, "bits_per_byte": 2.6},
        },
        "rows": [_row(name, of_seed, spread, slope, generator) for name in EFFECTS],
    }


def _row(name: str, of_seed: np.ndarray, spread: float, slope: float, generator: np.random.Generator) -> dict[str, Any]:
    in_table1 = name in ("moxe", "xlstm", "gemma2", "qwen-moe")
    section = "gamma" if name.startswith("gamma") and name != "gemma2" else "table1" if in_table1 else "table2"
    parameters, perplexity, change = PAPER.get(name, (None, None, None))
    noise = 50 * spread if name == "noisy" else spread
    return {
        "name": name,
        "label": {"moxe": "MoxE", "xlstm": "xLSTM", "gemma2": "Gemma 2"}.get(name, name),
        "tables": ["table1", "table2"] if name == "moxe" else [section] if section != "gamma" else [],
        "section": section,
        "is_reference": name == "moxe",
        "note": "",
        "settings": {"model.gamma": float(name.split("-")[1])} if section == "gamma" else {},
        "paper": {"parameters": parameters, "lambada_perplexity": perplexity, "change_percent": change},
        "parameters": 9_300_000,
        "active_parameters": 5_000_000,
        "flops_per_token": 31_000_000,
        "learning_rate": 0.003,
        "tuning": [{"learning_rate": rate, "validation_loss": 4.0 + rate} for rate in (0.001, 0.003)],
        "speed": _speed(SPEEDS[name]) if name in SPEEDS else None,
        "runs": [
            _run(name, seed, base + EFFECTS[name] + float(generator.normal(0, noise)), slope, generator)
            for seed, base in enumerate(of_seed)
        ],
    }


def _run(name: str, seed: int, effect: float, slope: float, generator: np.random.Generator) -> dict[str, Any]:
    loss = 4.0 + effect
    tokens = [TOKENS * (line + 1) // LINES for line in range(LINES)]
    lm_loss = [loss + math.log(TOKENS / seen) for seen in tokens]
    run = {
        "seed": seed,
        "status": "done",
        "error": None,
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2) / 4,
        "lambada_perplexity": math.exp(10 + 10 * effect),
        "lambada_accuracy": 0.1 - effect / 10,
        "lambada_token_perplexity": math.exp(3 + effect),
        "tokens": TOKENS,
        "seconds": 50.0,
        "tokens_per_second": TOKENS / 50 * (1 + 0.01 * float(generator.random())),
        "peak_memory_bytes": 200_000_000 if name == "moxe" else 400_000_000,
        "curves": {
            "training": {"tokens": tokens, "lm_loss": lm_loss},
            "validation": {"tokens": tokens, "lm_loss": lm_loss},
        },
        "analysis": None,
    }
    if name in ("moxe", "no-group-loss", "qwen-moe"):
        uneven = 0.2 if name == "no-group-loss" else 0.02
        load = (
            0.25 + np.array([3.0, -1.0, -1.0, -1.0]) / 3 * uneven + generator.normal(0, 1e-3, (LINES, LAYERS, EXPERTS))
        )
        run["curves"]["load"] = load.tolist()
        run["curves"]["training"] |= {"z_loss": [2.0] * LINES, "load_balancing_loss": [1.1] * LINES}
    if name == "moxe":
        run["analysis"] = {
            "gamma": GAMMA,
            "expert_kind": "xlstm",
            "layers": [_layer(slope, generator) for _ in range(LAYERS)],
        }
    return run


def _layer(slope: float, generator: np.random.Generator) -> dict[str, Any]:
    value, correlation = slope + float(generator.normal(0, 0.01)), 0.3 + float(generator.normal(0, 0.01))
    return {
        "difficulty": {
            "mean": 0.7,
            "variance": 0.05,
            "odds_slope": {"value": value, "low": value - 0.1, "high": value + 0.1},
            "assignment_slope": None,
        },
        "share_with_rarity": {"value": correlation, "low": correlation - 0.1, "high": correlation + 0.1},
    }


def row_named(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["name"] == name)


def fail(row: dict[str, Any], seed: int, error: str) -> None:
    """A run that ended without a number, as the runner writes it."""
    row["runs"][seed] = {"seed": seed, "status": "failed", "error": error}


def diverge(row: dict[str, Any], seed: int, loss: float) -> None:
    row["runs"][seed]["validation_loss"] = loss
    row["runs"][seed]["lambada_perplexity"] = math.inf


def _speed(tokens_per_second: float) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens_per_second,
        "seconds_a_generated_token": 1 / tokens_per_second,
        "threads": 1,
    }
