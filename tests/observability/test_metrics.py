"""metrics.jsonl: appended, taken back to a checkpoint when a run goes on, never silent about what is not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moxe.errors import UserError
from moxe.observability.metrics import MetricsFile, read_metrics


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n')
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "loss": 2.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_a_resumed_run_begins_with_the_lines_of_its_checkpoint(tmp_path: Path):
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy"
    metrics = MetricsFile(path)
    for step in (10, 20, 20):
        metrics.write({"step": step})
    metrics.copy_to(copy)
    metrics.write({"step": 30})
    resumed = MetricsFile(path, copy)
    assert steps(path) == [10, 20, 20]
    resumed.write({"step": 30})
    assert steps(path) == [10, 20, 20, 30]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "copy"}


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 2')
    assert steps(path) == [10]


@pytest.mark.parametrize("line", ["", "[1]", "{", "nonsense", "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n' + line + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is no JSON object"):
        read_metrics(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n\xff\n')
    with pytest.raises(UserError, match="no valid UTF-8"):
        read_metrics(path)


def test_numbers_that_are_not_finite_are_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": math.nan, "gradient_norm": math.inf})
    assert "NaN" in path.read_text()
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert math.isinf(record["gradient_norm"])
