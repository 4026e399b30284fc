"""metrics.jsonl: appended, cut at the step a run is resumed from, never silent about numbers that are not finite."""

from __future__ import annotations

import math
from pathlib import Path

from moxe.observability.metrics import MetricsFile, read_metrics


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n')
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "loss": 2.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_a_resumed_run_repeats_no_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in (10, 20, 20, 30):
        metrics.write({"step": step})
    resumed = MetricsFile(path, last_step=20)
    resumed.write({"step": 30})
    assert steps(path) == [10, 20, 20, 30]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 2')
    assert steps(path) == [10]
    MetricsFile(path, last_step=10).write({"step": 20})
    assert steps(path) == [10, 20]


def test_numbers_that_are_not_finite_are_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": math.nan, "gradient_norm": math.inf})
    assert "NaN" in path.read_text()
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert math.isinf(record["gradient_norm"])
