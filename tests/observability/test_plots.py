"""The pictures of a run come from metrics.jsonl alone, for every kind of run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from moxe.errors import UserError
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.plots import draw_run

NAMES = ["losses.png", "utilisation.png", "routing.png", "gradients.png"]


def write_run(folder: Path, lines: int, *, layers: int = 2, experts: int = 4, difficulty: bool = True) -> Path:
    records: list[dict[str, Any]] = []
    for step in range(1, lines + 1):
        of_layers = [
            {
                "load": [1 / experts] * experts,
                "difficulty_mean": 0.5 if difficulty else None,
                "difficulty_variance": 0.1 if difficulty else None,
                "router_entropy": 0.9,
                "mlstm_share": 0.5,
            }
            for _ in range(layers)
        ]
        losses = {term: 1 / step for term in MoxEForCausalLM.loss_terms if difficulty or term != "difficulty_loss"}
        norms = {"gradient_norm": 1.0, "gradient_norms": {"embedding": 0.6, "slstm_experts": 0.8}}
        records.append({"step": step, "tokens": step, **losses, **norms, "layers": of_layers})
        records.append({"step": step, **{f"validation_{term}": value for term, value in losses.items()}})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "run",
    [
        {"lines": 1},
        {"lines": 3, "layers": 4, "experts": 16},
        {"lines": 3, "layers": 1, "experts": 2, "difficulty": False},
    ],
)
def test_a_run_gives_four_pictures(run: dict[str, Any], tmp_path: Path):
    files = draw_run(write_run(tmp_path, **run), tmp_path / "plots")
    assert [file.name for file in files] == NAMES
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(NAMES)
    for file in files:
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01


def test_losses_that_are_not_finite_can_be_drawn(tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[2]["lm_loss"] = math.nan
    records[2]["gradient_norms"]["embedding"] = math.nan
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(draw_run(path, tmp_path / "plots")) == 4


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_gradients_of_which_none_is_positive_and_finite_can_be_drawn(norm: float, tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.update({"gradient_norm": norm, "gradient_norms": {"embedding": norm, "head": norm}})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(draw_run(path, tmp_path / "plots")) == 4


@pytest.mark.parametrize(("lines_with_norms", "names"), [(0, NAMES[:3]), (1, NAMES)])
def test_lines_without_gradient_norms_can_be_drawn(lines_with_norms: int, names: list[str], tmp_path: Path):
    path = write_run(tmp_path, 3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in [record for record in records if "layers" in record][: 3 - lines_with_norms]:
        del record["gradient_norms"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [file.name for file in draw_run(path, tmp_path / "plots")] == names


def test_a_missing_or_empty_metrics_file_is_refused_and_nothing_is_drawn(tmp_path: Path):
    with pytest.raises(UserError, match="no metrics file"):
        draw_run(tmp_path / "none.jsonl", tmp_path / "plots")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no training line"):
        draw_run(tmp_path / "empty.jsonl", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
