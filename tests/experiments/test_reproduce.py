"""`moxe reproduce` from the command to the report, with models that train for three steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moxe import cli
from moxe.data import hub
from moxe.experiments.grid import FORMAT
from moxe.experiments.results_file import read_results
from moxe.experiments.tables import rows_of

SHORT = (
    *("--data.validation_documents", "2", "--data.sequence_length", "64", "--training.batch_size", "2"),
    *("--training.max_steps", "3", "--training.eval_steps", "2", "--training.logging_steps", "1"),
)


def command(out: Path, lambada: Path | str, *more: str) -> list[str]:
    return ["reproduce", "table1", "--seeds", "1", "--jobs", "2", "--out", f"{out}", "--lambada", f"{lambada}", *more]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The call returns a new {word}"}) + "\n" for word in ("list", "value"))
    )
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """The results of Table 1 with one seed."""
    out = tmp_path_factory.mktemp("results") / "tiny"
    assert cli.main([*command(out, texts), *SHORT]) == 0
    return out


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["name"] == name)


def evaluation(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    return json.loads((out / "runs" / run["run"] / "evaluation.json").read_text())


def test_every_model_of_the_table_is_trained_and_evaluated_on_the_same_tokens_and_windows(out: Path):
    results = read_results(out / "results.json")
    runs = [run for row in results["rows"] for run in row["runs"]]
    assert [row["name"] for row in results["rows"]] == [row.name for row in rows_of("table1")]
    assert {run["status"] for run in runs} == {"done"}
    assert {run["tokens"] for run in runs} == {3 * 2 * 64}
    evaluations = [evaluation(out, run) for run in runs]
    assert len({(found["validation"]["tokens"], found["validation"]["bytes"]) for found in evaluations}) == 1
    assert len({found["lambada"]["tokens"] for found in evaluations}) == 1
    windows = [np.load(out / "runs" / run["run"] / "scores.npz")["window_tokens"] for run in runs]
    assert all((one == windows[0]).all() for one in windows)


def test_the_results_are_the_numbers_of_the_runs(out: Path):
    results = read_results(out / "results.json")
    for one in results["rows"]:
        (run,) = one["runs"]
        found = evaluation(out, run)
        assert run["validation_loss"] == found["validation"]["loss"] == one["summary"]["validation_loss"]["mean"]
        assert run["lambada_perplexity"] == found["lambada"]["last_word_perplexity"]
        scores = np.load(out / "runs" / run["run"] / "scores.npz")
        mean = -scores["windows"].sum() / scores["window_tokens"].sum()
        assert mean == pytest.approx(run["validation_loss"], rel=1e-6)
        assert np.exp(-scores["last_words"].mean()) == pytest.approx(run["lambada_perplexity"], rel=1e-6)


def test_what_only_a_router_has_is_there_for_moxe_alone(out: Path):
    results = read_results(out / "results.json")
    assert "z_loss" in row(results, "moxe")["runs"][0]["curves"]["training"]
    assert "load_balancing_loss" in row(results, "qwen2_moe")["runs"][0]["curves"]["training"]
    assert "z_loss" not in row(results, "llama")["runs"][0]["curves"]["training"]
    assert len(row(results, "moxe")["runs"][0]["curves"]["load"]) == 3
    assert row(results, "xlstm")["runs"][0]["analysis"] is None


def test_the_reports_are_there_and_name_no_folder_of_this_machine(out: Path):
    for name in ("table1.md", "table2.md", "report.html", "figures/fig3a.png", "figures/fig3a.svg"):
        assert (out / name).stat().st_size > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Qwen1.5-MoE" in page
    for text in (page, (out / "results.json").read_text(encoding="utf-8")):
        assert f"{out.parent}" not in text
    assert row(read_results(out / "results.json"), "moxe")["speed"]["tokens_per_second"] > 0


def test_the_same_command_repeats_nothing(out: Path, texts: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/evaluation.json")}
    assert cli.main([*command(out, texts), *SHORT]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/evaluation.json")} == before
    assert "nats a token" not in capsys.readouterr().out  # which is said of each run that is done


def test_a_failed_run_is_in_the_report_and_the_others_are_there(out: Path, texts: Path, tmp_path: Path):
    copy = tmp_path / "tiny"
    (copy / "runs").mkdir(parents=True)
    for name in ("grid.json", "speed.json"):
        (copy / name).write_bytes((out / name).read_bytes())
    for run in out.glob("runs/*"):
        if run.name.startswith("llama"):  # a checkpoint that is damaged, and no other to go on from
            (copy / "runs" / run.name / "checkpoint-2").mkdir(parents=True)
            (copy / "runs" / run.name / "checkpoint-2" / "manifest.json").write_text("{")
        else:
            (copy / "runs" / run.name).symlink_to(run)
    assert cli.main([*command(copy, texts), *SHORT]) == cli.EXIT_FAILED
    results = read_results(copy / "results.json")
    (failed,) = row(results, "llama")["runs"]
    assert failed["status"] == "failed"
    assert "checkpoint-2" in failed["error"]
    assert row(results, "gemma2")["runs"][0]["status"] == "done"
    assert "checkpoint-2" in (copy / "report.html").read_text(encoding="utf-8")


def test_a_grid_that_is_stopped_saves_and_goes_on_with_the_same_command(tmp_path: Path):
    out = tmp_path / "tiny"
    arguments = [*command(out, "none"), *SHORT, "--training.max_steps", "100000", "--training.learning_rate", "1e-4"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-m", "moxe", *arguments], env=environment, stdout=subprocess.PIPE) as moxe:
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        moxe.send_signal(signal.SIGTERM)
        moxe.communicate(timeout=60)
    assert moxe.returncode == 128 + signal.SIGTERM
    assert len(list(out.glob("runs/*/checkpoint-*"))) == 2
    assert list(out.glob("runs/*/evaluation.json")) == []
    assert list(out.glob("runs/*/error.txt")) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["table3"], "there is no table 'table3': there are table1, table2, figures"),
        (["table1", "--scale", "huge"], "there is no scale 'huge': there are tiny, small, paper"),
        (["table1", "--seeds", "0"], "'0' is not a whole number from 1"),
        (["table1", "--jobs", "0"], "'0' is not a whole number from 1"),
        (["table1", "--data.source", "nowhere.txt", "--lambada", "none"], "'nowhere.txt' does not exist"),
        (["table1", "--lambada", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["table1", "--training.seed", "3"], "training.seed is set by the rows of the table"),
        (["table1", "--model.gamma", "3"], "model.gamma is set by the rows of the table"),
        (["table1", "--training.max_step", "3", "--lambada", "none"], "did you mean 'max_steps'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *arguments]) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def unreachable(*arguments: Any, **options: Any) -> Any:
    raise ConnectionError("no route to the hub")


def test_a_folder_made_with_lambada_is_not_gone_on_with_where_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results"
    out.mkdir()
    (out / "grid.json").write_text(json.dumps({"format": FORMAT, "lambada": True}))
    monkeypatch.setattr(hub, "_open_builder", unreachable)
    monkeypatch.setattr(hub, "sleep", lambda seconds: None)
    assert cli.main(["reproduce", "table1", "--out", f"{out}"]) == cli.EXIT_USER_ERROR
    assert "were made with LAMBADA; give --lambada FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("grid.json", json.dumps({"format": FORMAT + 1}), "holds results of another version of moxe"),
        ("grid.json", "{", "is no results of moxe reproduce"),
        ("notes.txt", "mine", "is no results of moxe reproduce"),
    ],
)
def test_a_folder_that_is_not_ours_to_write_is_refused_and_left_alone(
    name: str, content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results"
    out.mkdir()
    (out / name).write_text(content)
    assert cli.main(command(out, "none")) == cli.EXIT_USER_ERROR
    assert sentence in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, content)]
