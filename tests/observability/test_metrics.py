"""metrics.jsonl: appended, taken back to a checkpoint when a run goes on, never silent about what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moxe.errors import UserError
from moxe.observability.metrics import MetricsFile, RunMetrics, read_metrics, read_run
from tests.observability.runs import read_lines, write_lines, write_run


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


def test_a_run_is_read_by_kind_of_line_without_one_that_was_cut_off(tmp_path: Path):
    path = write_run(tmp_path, 3)
    training, validation = read_lines(path, "layers"), read_lines(path, "validation_loss")
    assert [line["step"] for line in training] == [line["step"] for line in validation] == [1, 2, 3]
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 4, "laye', encoding="utf-8")
    assert read_run(path) == RunMetrics(training, validation)


@pytest.mark.parametrize(
    ("spoil", "flaw"),
    [
        (lambda line: line.pop("step"), "has no step"),
        (lambda line: line.update(lm_loss="low"), "holds lm_loss='low', which is no number"),
        (lambda line: line.update(gradient_norms=[1.0]), r"holds gradient_norms=\[1.0\], so no training"),
        (lambda line: line["gradient_norms"].update(head=None), "holds head=None, which is no number"),
        (lambda line: line.update(layers=3), "holds layers that no training wrote"),
        (lambda line: line.update(layers=line["layers"][:1]), "holds other layers or experts than"),
        (lambda line: line["layers"][1].pop("load"), "holds layers that no training wrote"),
        (lambda line: line["layers"][1].update(load=[1.0]), "holds layers that no training wrote"),
        (lambda line: line["layers"][1].update(load=["all"] * 4), "holds layers that no training wrote"),
        (lambda line: line["layers"][1].update(router_entropy="high"), "holds layers that no training wrote"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_line_of_a_run_is_named(
    spoil: Callable[[dict[str, Any]], None], flaw: str, number: int, tmp_path: Path
):
    path = write_run(tmp_path, 2)
    records = read_lines(path)
    spoil(records[number - 1])
    write_lines(path, records)
    # Of the first line it is the second training line that then differs, where the first is whole in itself.
    with pytest.raises(UserError, match=rf"line [{number}3] of .*metrics\.jsonl {flaw}"):
        read_run(path)


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="there is no metrics file"):
        read_run(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="holds no training line"):
        read_run(write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "validation_loss": 2.0}]))
