"""Metrics of runs that were never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moxe.models.modeling_moxe import MoxEForCausalLM


def write_run(
    folder: Path,
    lines: int,
    *,
    layers: int = 2,
    experts: int = 4,
    difficulty: bool = True,
    every: int = 1,
    shift: float = 0.0,
) -> Path:
    """metrics.jsonl in `folder`, which is made: a training and a validation line every `every` steps.

    Args:
        layers, experts: no layers: a model without routers, whose loss is the cross-entropy alone.
        difficulty: whether the router has one.
        shift: moves every number of the run, and makes the load of the experts uneven.
    """
    records: list[dict[str, Any]] = []
    for step in range(every, every * lines + 1, every):
        weights = [1 + shift * expert * step for expert in range(experts)]
        of_layers = [
            {
                "load": [weight / sum(weights) for weight in weights],
                "difficulty_mean": 0.5 + shift + layer / 10 if difficulty else None,
                "difficulty_variance": 0.1 + shift if difficulty else None,
                "router_entropy": 0.9 - shift / step,
                "mlstm_share": 0.5 + shift / step,
            }
            for layer in range(layers)
        ]
        terms = [term for term in MoxEForCausalLM.loss_terms if difficulty or term != "difficulty_loss"]
        losses = {term: 1 / step + shift for term in (terms if layers else ["lm_loss"])}
        losses["loss"] = sum(losses.values())
        norms = {"gradient_norm": 1.0 + shift, "gradient_norms": {"embedding": 0.6, "slstm_experts": 0.8}}
        speed = {"tokens_per_second": 1000.0 + 100 * shift + step}
        records.append({"step": step, "tokens": step, **losses, **norms, **speed, "layers": of_layers})
        records.append({"step": step, **{f"validation_{term}": 1.1 * value for term, value in losses.items()}})
    folder.mkdir(parents=True, exist_ok=True)
    return write_lines(folder / "metrics.jsonl", records)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The lines that hold this key."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if key in record]
